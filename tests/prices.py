"""What each test costs: CPU seconds of its process and of all that it started. The end of the terminal's output names the dearest."""

import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests import forks

SHOWN = 10
_costs: Counter[str] = Counter()
_workers: list[float] = []
_before = 0.0
_counts_living = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--prices", metavar="FILE", help="Write the CPU seconds of every test to this file, dearest first."
    )


def pytest_configure(config: pytest.Config) -> None:
    global _counts_living
    _counts_living = bool(config.getoption("--prices"))


def spent() -> float:
    """CPU seconds of this process and of all that it has waited for, since it started; with `--prices`, of what still runs too.

    Otherwise processes that several tests share would be on the account of the test that ends them.
    """
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime + forks.used_by_children() + (living() if _counts_living else 0.0)


def living() -> float:
    seconds = -forks.told_seconds()  # of what the processes that fork have waited for; it is counted where they tell it
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            used = process.cpu_times()
            seconds += used.user + used.system + used.children_user + used.children_system
    return seconds


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """A part of a test (setup, call or teardown) has ended: what was spent since the one before is its cost."""
    global _before
    report = yield
    now = spent()
    report.cpu_seconds, _before = now - _before, now
    return report


def pytest_collection_finish() -> None:
    global _before
    _before = spent()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Also of the tests of xdist's workers, whose reports arrive here."""
    _costs[report.nodeid] += getattr(report, "cpu_seconds", 0.0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    forks.close()
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["cpu_seconds"] = spent()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    _workers.append(getattr(node, "workeroutput", {}).get("cpu_seconds", 0.0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section(f"the {SHOWN} dearest tests, in CPU seconds")
    for name, seconds in _costs.most_common(SHOWN):
        terminalreporter.line(f"{seconds:7.1f} {name}")
    if file := terminalreporter.config.getoption("--prices"):
        Path(file).write_text("".join(f"{seconds:.2f} {name}\n" for name, seconds in _costs.most_common()))
    # workers that have ended are in `spent` already, as children
    everything = max(spent(), sum(_workers))
    terminalreporter.line(f"{sum(_costs.values()):7.1f} all {len(_costs)} tests; {everything:.1f} with imports")
