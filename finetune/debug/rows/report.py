"""What `data check` prints: a table, then places and facts."""

from collections.abc import Sequence
from typing import TypedDict

from finetune.data.checks import CHECKS
from finetune.data.checks.facts import Facts, Spread, picture
from finetune.errors import counted

PLACES = 5  # of a check that a reader sees


class Problem(TypedDict):
    check: str
    row: int | None
    where: str
    message: str


class SourceRows(TypedDict):
    key: str
    name: str
    rows: int


class Checked(Facts):
    ok: bool
    problems: list[Problem]
    remarks: list[Problem]
    counts: dict[str, int]
    """Of findings, by check."""
    left_out: dict[str, int]
    """Findings that are counted and not listed."""
    rows: int
    held_out_rows: int
    sources: list[SourceRows]


def listing(facts: Checked, places: int = PLACES) -> str:
    lines = [_row("rows", f"{each['rows']:,} in {each['name']} ({each['key']})") for each in facts["sources"]]
    if facts["held_out_rows"]:
        lines.append(_row("held out", f"{facts['held_out_rows']:,} of them"))
    for level, found in (("problem", facts["problems"]), ("remark", facts["remarks"])):
        names = [name for name in facts["counts"] if CHECKS[name].level == level]
        count = sum(facts["counts"][name] for name in names)
        lines += ["", f"{counted(count, level)}" if count else f"no {level}s"]
        width = max(map(len, names), default=0)
        lines += [f"  {name:{width}}  {facts['counts'][name]:>6,}  {CHECKS[name].says}" for name in names]
        lines += [line for name in names for line in _places(name, found, facts["counts"][name], places)]
    return "\n".join([*lines, "", *_facts(facts)])


def _places(name: str, found: Sequence[Problem], count: int, places: int) -> list[str]:
    shown = [each for each in found if each["check"] == name][:places]
    lines = ["", name, *(": ".join(filter(None, (f"  {each['where']}", each["message"]))) for each in shown)]
    return lines + ([f"  and {count - len(shown):,} more"] if count > len(shown) else [])


def _facts(facts: Checked) -> list[str]:
    lines = []
    for name, found in (("tokens", facts["tokens"]), ("learnt", facts["learnt_tokens"])):
        lines += [_row(name, _percentiles(found))] if found else []
    if facts["tokens"]:
        lines += [_row("", line) for line in picture(facts["tokens"])]
    languages = ", ".join(f"{name} {language['rows']:,}" for name, language in facts["languages"].items())
    lines += [_row("languages", languages)] if languages else []
    for name, counts in (("roles", facts["roles"]), ("calls", facts["tools"]), ("tools", facts["offered_tools"])):
        lines += [_row(name, ", ".join(f"{each} {count:,}" for each, count in counts.items()))] if counts else []
    return lines


def _percentiles(found: Spread) -> str:
    names = {"0": "shortest", "100": "longest", "50": "median"}
    return ", ".join(f"{names.get(share, f'{share} %')} {value:,}" for share, value in found["percentiles"].items())


def _row(name: str, text: str) -> str:
    return f"{name:11}{text}".rstrip()
