"""The end of a sweep: the trials that the held-out rows cannot tell from the best, and a report of all."""

from collections.abc import Sequence

from finetune.compare.candidates import compared
from finetune.compare.compare import Question
from finetune.compare.report.payload import Asked as AskedOfReport
from finetune.compare.report.payload import Report
from finetune.compare.report.write import write
from finetune.compare.results import Asked
from finetune.compare.sweep.directory import Sweep
from finetune.compare.sweep.report import TrialReport
from finetune.store.checkpoints.refs import parse, run_of

REPORTED = 20  # runs that one page shows well


def leaders(trials: Sequence[TrialReport]) -> list[str]:
    """The finished trials that cannot be told from the one with the lowest loss, on the rows that all were evaluated on, corrected for
    their number (`compare`); none where fewer than two are finished."""
    finished = [trial["ref"] for trial in trials if trial["state"] == "finished"]
    return compared(finished, Asked(), None, Question(changed=0))["leaders"] if len(finished) > 1 else []


def report(sweep: Sweep, trials: Sequence[TrialReport]) -> None:
    """`report.html`: the best trials that were trained, in the order of the table."""
    runs = [run_of(parse(trial["ref"])) for trial in trials if trial["step"]]
    if best := [run for run in runs if run][:REPORTED]:
        write(Report(best, AskedOfReport()), sweep.page, None)
