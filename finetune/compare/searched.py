"""What `average --search --json` prints, and the same as text; it must add no fact of its own."""

from collections.abc import Mapping
from typing import TypedDict

from finetune.compare import table
from finetune.compare.average import MemberFacts
from finetune.compare.shown import Comparison, Result
from finetune.plan.facts import Metrics


class Tried(TypedDict):
    """An average that was tried."""

    ref: str
    """Where it is, or would be."""
    choices: str
    """The options that choose its members and weights."""
    command: str
    """It makes this average again."""
    members: list[MemberFacts]
    is_kept: bool


class Searched(Comparison):
    """The comparison of all averages with the last checkpoint, and the one to take."""

    ref: str
    """The average that is better, or the last checkpoint where none is."""
    members: list[MemberFacts]
    metrics: Metrics
    """Of the one to take, on the rows that chose it."""
    averages: list[Tried]


def text(facts: Searched) -> str:
    """The table of `compare` with the options in place of long refs, then what is kept."""
    chosen = {each["ref"]: each["choices"] for each in facts["averages"]}
    kept = [each for each in facts["averages"] if each["is_kept"]]
    gone = [each["choices"] for each in facts["averages"] if not each["is_kept"]]
    lines = [table.text(_renamed(facts, chosen)).rstrip(), ""]
    if facts["best"] == facts["baseline"]:
        lines.append(f"the rows show no average that is better than {facts['baseline']}")
    else:
        lines.append("the rows that chose it are those that measured it: for a figure to report, evaluate it on others")
    lines += [f"kept: {each['ref']}" for each in kept]
    return "\n".join([*lines, *([f"removed: {', '.join(gone)}; --keep-all would keep them"] if gone else [])])


def _renamed(facts: Comparison, names: Mapping[str, str]) -> Comparison:
    """Also without tokens and seconds: those of all are the same."""
    longest_first = sorted(names, key=len, reverse=True)  # one ref may begin another

    def note(line: str) -> str:
        for ref in longest_first:
            line = line.replace(ref, names[ref])
        return line

    shown: list[Result] = [
        {**each, "ref": names.get(each["ref"], each["ref"]), "tokens": None, "seconds": None}
        for each in facts["results"]
    ]
    return {
        **facts,
        "results": shown,
        "pairs": [{**each, "b": names.get(each["b"], each["b"])} for each in facts["pairs"]],
        "best": names.get(facts["best"], facts["best"]),
        "leaders": [names.get(each, each) for each in facts["leaders"]],
        "notes": [note(line) for line in facts["notes"]],
    }
