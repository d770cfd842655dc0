"""A comparison as text, as Markdown and as CSV; it must add no fact of its own."""

import csv
import io
import math
from collections.abc import Iterable

from finetune.compare.shown import ChangedRow, Comparison, Pair, Result
from finetune.data.visible import visible
from finetune.errors import counted, duration
from finetune.plan.disk import readable
from finetune.plan.statistics.judge import Interval

LONGEST = 240  # characters of a row's text
UNITS = {"tokens": " a token", "rows": ""}


def text(facts: Comparison) -> str:
    """For a reader: the table, then what to take and what to know."""
    rows = _table(facts)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([_about(facts), "", *lines, "", *_ending(facts), *_differences(facts), *_changed(facts)])


def markdown(facts: Comparison) -> str:
    head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in _table(facts)]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([_about(facts), "", *lines, "", *(f"- {line}" for line in _ending(facts))])


COLUMNS = (
    *("ref", "value", "low", "high", "baseline", "difference", "difference_low", "difference_high"),
    *("all_low", "all_high", "p_value", "p_corrected", "smallest", "verdict", "won", "lost"),
    *("unpaired_rows", "not_finite_rows", "tokens", "seconds", "bytes"),
)


def comma_separated(facts: Comparison) -> str:
    """A line for each ref, all figures with all digits."""
    pairs = {pair["b"]: pair for pair in facts["pairs"]}
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for result in facts["results"]:
        pair = pairs.get(result["ref"])
        own = [result["ref"], result["value"], *_ends(result["interval"])]
        of_pair = (
            [
                *(pair["a"], pair["difference"], *_ends(pair["interval"]), *_ends(pair["interval_of_all"])),
                *(pair["p_value"], pair["p_corrected"], pair["smallest"], pair["verdict"], pair["won"], pair["lost"]),
            ]
            if pair
            else [None] * 12
        )
        cost = [result["tokens"], result["seconds"], result["bytes"]]
        writer.writerow([*own, *of_pair, result["unpaired_rows"], result["not_finite_rows"], *cost])
    return file.getvalue().rstrip("\n")


def _about(facts: Comparison) -> str:
    measure = f"{facts['metric']}{UNITS[facts['per']]}, {facts['better']} is better"
    tokens = f" with {counted(facts['tokens'], 'token')}" if facts["tokens"] else ""
    clusters = f" in {counted(facts['clusters'], 'cluster')}" if facts["clusters"] else ""
    return f"{facts['set']}: {measure}; {counted(facts['rows'], 'row')}{tokens}{clusters}; intervals of 95 %"


def _table(facts: Comparison) -> list[list[str]]:
    places, pairs = _places(facts), {pair["b"]: pair for pair in facts["pairs"]}
    head = ["ref", facts["metric"], "interval", "difference", "interval", "p", "verdict", "tokens", "time", "size"]
    rows = [_row(result, pairs.get(result["ref"]), places, facts["baseline"]) for result in facts["results"]]
    # a column that nothing fills is left out
    kept = [number for number in range(len(head)) if any(row[number] for row in rows)]
    return [[row[number] for number in kept] for row in (head, *rows)]


def _row(result: Result, pair: Pair | None, places: int, baseline: str) -> list[str]:
    own = [result["ref"], f"{result['value']:.{places}f}", _interval(result["interval"], f".{places}f")]
    compared = ["", "", "", "baseline"] if result["ref"] == baseline else _compared(pair, places)
    tokens, seconds, size = result["tokens"], result["seconds"], result["bytes"]
    cost = [
        "" if tokens is None else f"{tokens:,}",
        "" if not seconds else duration(seconds),
        "" if size is None else readable(size),
    ]
    return [*own, *compared, *cost]


def _compared(pair: Pair | None, places: int) -> list[str]:
    if pair is None:
        return ["", "", "", ""]
    p_value = pair["p_corrected"]
    verdict: str = pair["verdict"] or "no verdict"
    if pair["verdict"] == "not distinguishable" and pair["smallest"] is not None:
        verdict += f" (rows can show {pair['smallest']:.{places}f})"
    interval = _interval(pair["interval"], f"+.{places}f")
    shown = "" if p_value is None else "<0.0001" if p_value < 1e-4 else f"{p_value:.2g}"
    return [f"{pair['difference']:+.{places}f}", interval, shown, verdict]


def _ending(facts: Comparison) -> list[str]:
    best, others = facts["best"], [ref for ref in facts["leaders"] if ref != facts["best"]]
    chosen = f"best: {best}" if best != facts["baseline"] or not facts["pairs"] else f"best: {best}: none is better"
    close = [f"not distinguishable from the best value: {', '.join(facts['leaders'])}"] if others else []
    pair = next((pair for pair in facts["pairs"] if pair["b"] == best), None)
    if pair and pair["interval_of_all"] and len(facts["pairs"]) > 1:
        ends = _interval(pair["interval_of_all"], f"+.{_places(facts)}f")
        chosen += f", by {ends}, allowing for the choice among {len(facts['results'])}"
    return [*([chosen] if facts["pairs"] else []), *close, *(f"note: {note}" for note in facts["notes"])]


def _differences(facts: Comparison) -> Iterable[str]:
    for pair in facts["pairs"]:
        for entry in pair["recipe"]:
            yield visible(f"recipe of {pair['b']}: {entry['key']}: {entry['a']} -> {entry['b']}")


def _changed(facts: Comparison) -> Iterable[str]:
    """Of the only pair, or of the best ref; the others are in the JSON."""
    pairs = facts["pairs"] if len(facts["pairs"]) == 1 else [p for p in facts["pairs"] if p["b"] == facts["best"]]
    for pair in pairs:
        if pair["changed"]:
            yield f"rows that changed most from {pair['a']} to {pair['b']}:"
        for row in pair["changed"]:
            yield from _changed_row(row)


def _changed_row(row: ChangedRow) -> Iterable[str]:
    tokens = f", {counted(row['tokens'], 'token')}" if row["tokens"] else ""
    yield f"  row {row['row']:,}: {row['a']:.4g} -> {row['b']:.4g}{tokens}"
    texts = [row["text"] or "", *(f"{side}: {row[side]}" for side in ("answer_a", "answer_b") if side in row)]
    for shown in filter(None, texts):
        # the answer comes last
        cut = shown if len(shown) <= LONGEST else f"{shown[: LONGEST // 2]} … {shown[-LONGEST // 2 :]}"
        for line in cut.splitlines():
            text = line.lstrip(" ")
            yield f"    {' ' * (len(line) - len(text))}{visible(text)}"


def _places(facts: Comparison) -> int:
    """Digits after the point: three of the narrowest interval."""
    ends = [pair["interval"] for pair in facts["pairs"]] + [result["interval"] for result in facts["results"]]
    widths = [high - low for low, high in filter(None, ends) if high > low]
    return min(max(2 - math.floor(math.log10(min(widths))), 2), 8) if widths else 4


def _interval(ends: Interval | None, form: str) -> str:
    return "" if ends is None else f"{ends[0]:{form}} to {ends[1]:{form}}"


def _ends(ends: Interval | None) -> tuple[float | None, float | None]:
    return ends or (None, None)
