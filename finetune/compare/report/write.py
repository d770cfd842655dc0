"""Writes a report to its file, and its main plots beside it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict

from finetune.compare.report.buckets import unpacked
from finetune.compare.report.page import page
from finetune.compare.report.payload import Payload, Report
from finetune.compare.series import Series, smoothed
from finetune.errors import FinetuneError
from finetune.package.card.pictures import Drawn, plot
from finetune.store.durable import failures


class Reported(TypedDict):
    """What `report --json` prints."""

    path: str
    pictures: list[str]


def write(report: Report, output: Path, pictures: Path | None) -> Reported:
    if not output.absolute().parent.is_dir():
        raise FinetuneError("there is no such folder", where=str(output.parent))
    report.update()
    payload = report.payload()
    with failures(output, FinetuneError):
        output.write_bytes(page(payload).encode())
    if pictures is None:
        return {"path": str(output), "pictures": []}
    made = {pictures / name: data for name, data in _pictures(report.series, payload).items()}
    with failures(pictures, FinetuneError):
        pictures.mkdir(parents=True, exist_ok=True)
        for path, data in made.items():
            path.write_bytes(data)
    return {"path": str(output), "pictures": [*map(str, made)]}


def _pictures(series: Sequence[Series], payload: Payload) -> dict[str, bytes]:
    """PNGs by name: losses, other held-out figures, learning rate, gradient norm. More than 1,000 steps are drawn as their means."""
    lines = partial(_lines, series)
    found = {"loss.png": plot([*lines("loss"), *_points(payload, "loss")], "Loss", "loss (nats per supervised token)")}
    for name in dict.fromkeys(name for run in payload["runs"] for name in run["held_out"] if name != "loss"):
        found[f"held_out_{name.replace('/', '_')}.png"] = plot(_points(payload, name), f"Held-out {name}", name)
    found["learning_rate.png"] = plot(lines("learning_rate"), "Learning rate", "learning rate")
    found["grad_norm.png"] = plot(lines("grad_norm"), "Gradient norm", "gradient norm, before clipping")
    return found


def _lines(series: Sequence[Series], name: str) -> list[Drawn]:
    return [
        Drawn(
            str(each.run),
            each.steps.step,
            smoothed(each.steps.figure(name), max(1, len(each.steps.step) // 1000)),
            _color(place),
        )
        for place, each in enumerate(series)
    ]


def _points(payload: Payload, name: str) -> list[Drawn]:
    found = []
    for place, run in enumerate(payload["runs"]):
        if points := run["held_out"].get(name):
            steps, value, low, high = (unpacked(points[key]) for key in ("steps", "value", "low", "high"))
            found.append(Drawn(f"{run['name']}, held-out", steps, value, _color(place), low, high, are_points=True))
    return found


def _color(place: int) -> str:
    return f"C{place % 10}"
