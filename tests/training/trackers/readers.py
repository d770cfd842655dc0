"""What a tracker has of a run, read back by its own client."""

import math
import struct
from collections.abc import Callable
from pathlib import Path

from finetune.store.run.directory import RunDirectory
from tests.training.trackers.story import Figures

_BLOCK, _HEADER = 32768, 7  # of the log files of LevelDB, whose format the client's have


def tensorboard(run: Path) -> Figures:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: _by_step((event.step, event.value) for event in events.Scalars(name)) for name in events.Tags()["scalars"]
    }


def wandb(run: Path) -> Figures:
    """Of the offline files; there are those of one attempt alone."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (run / "trackers/wandb").glob("offline-run-*/run-*.wandb")
    found: dict[str, list[tuple[int, float]]] = {}
    steps = []
    for data in _records(file.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): float(item.value_json) for item in record.history.item}
            steps.append(items["_step"])
            for name, value in items.items():
                found.setdefault(name, []).append((int(items["step"]), value))
    assert steps == sorted(set(steps)), "the client drops figures of a step that does not grow"
    return {name: _by_step(pairs) for name, pairs in found.items()}


def mlflow(run: Path) -> Figures:
    from mlflow import MlflowClient

    client = MlflowClient()
    (found,) = client.search_runs(["0"], f"tags.`finetune.run` = '{RunDirectory(run).plan()[1]['run']}'")
    return {
        name: _by_step((metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, name))
        for name in found.data.metrics
    }


def trackio(run: Path) -> Figures:
    from trackio import Api

    (found,) = (each for each in Api().runs("finetune") if each.id == RunDirectory(run).plan()[1]["run"])
    from trackio.sqlite_storage import SQLiteStorage

    found_figures: dict[str, list[tuple[int, float]]] = {}
    for line in SQLiteStorage.get_logs("finetune", run_id=found.id):
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step":
                found_figures.setdefault(name, []).append((line["step"], value))
    return {name: _by_step(pairs) for name, pairs in found_figures.items()}


def aim(run: Path) -> Figures:
    from aim import Repo

    repository = Repo.from_path(".")
    repository._recreate_index()  # as its pages do in the background
    found = repository.get_run((run / "trackers/aim.run").read_text())
    columns = {metric.name: metric.data.items_list() for metric in found.metrics()}
    return {name: _by_step(zip(steps, values[0], strict=True)) for name, (steps, values) in columns.items()}


READERS: dict[str, Callable[[Path], Figures]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "mlflow": mlflow,
    "trackio": trackio,
    "aim": aim,
}


def _by_step(pairs) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for step, value in pairs:
        found.setdefault(int(step), []).append(math.nan if value is None else float(value))
    return found


def _records(data: bytes):
    """The records of a file: each in one piece, or in several, where it does not fit in a block."""
    place, record = _HEADER, b""  # the file begins with a header of its client
    while place + _HEADER <= len(data):
        if _BLOCK - place % _BLOCK < _HEADER:
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + _HEADER])
        if kind == 0:  # the file was not written on
            break
        record += data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""
