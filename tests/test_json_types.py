"""The types of what `--json` prints have the keys that docs/commands.md shows."""

import shlex
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Union, get_args, get_origin, get_type_hints, is_typeddict

import pytest
import yaml

from finetune.cli.main import ErrorReport
from finetune.compare import shown
from finetune.compare.average import Averaged
from finetune.compare.evaluate import Evaluated
from finetune.compare.generate import Answer
from finetune.compare.report.write import Reported
from finetune.compare.searched import Searched
from finetune.compare.sweep.report import SweepReport
from finetune.debug.bisect import Bisection
from finetune.debug.diff import Comparison
from finetune.debug.rehearse.shown import Outcome
from finetune.debug.replay import Replay
from finetune.debug.rows.convert import Converted
from finetune.debug.rows.report import Checked
from finetune.debug.rows.show import Shown
from finetune.hosts.doctor import Machine
from finetune.hosts.health import HealthReport
from finetune.package.export import Packaged
from finetune.package.publish.shown import Published
from finetune.store.checkpoints.pruning import Action, PinnedStep
from finetune.store.mirror.following import Mirrored
from finetune.store.run.shown import Description, RunLog, Verification
from finetune.training.ahead import Report
from finetune.training.preview import PlanFacts
from finetune.training.trackers.catching_up import Tracking
from tests.test_docs import ROOT, commands, fences

TYPES = {
    "data show": Shown,
    "data check": Checked,
    "data convert": Converted,
    "plan": PlanFacts,
    "encode": Report,
    "rehearse": Outcome,
    "prune: actions": Action,
    "prune: pinned": PinnedStep,
    "health": HealthReport,
    "track": Tracking,
    "mirror": Mirrored,
    "log": RunLog,
    "replay": Replay,
    "bisect": Bisection,
    "diff": Comparison,
    "show": Description,
    "show: error": ErrorReport,
    "verify": Verification,
    "evaluate: results": Evaluated,
    "average": Averaged,
    "average --search": Searched,
    "compare": shown.Comparison,
    "generate: results": Answer,
    "report": Reported,
    "sweep": SweepReport,
    "package": Packaged,
    "publish": Published,
    "doctor": Machine,
}


def documented() -> dict[str, object]:
    """The shape that the page shows of each type."""
    shown = {}
    for _, text in fences(ROOT / "docs/commands.md", "console"):
        for words, below in commands(text):
            if "--json" in words:
                assert below, shlex.join(words)
                shape = yaml.safe_load(below)
                command = " ".join(words[1 : 3 if words[1] == "data" else 2])
                command += " --search" if "--search" in words else ""
                inner = {f"{command}: {name}": part for name, part in shape.items()}
                shown |= {command: shape} if "error" not in shape else {}
                shown |= {name: part[0] if isinstance(part, list) else part for name, part in inner.items()}
    return shown


@pytest.mark.parametrize("name", TYPES)
def test_a_type_has_the_keys_that_its_page_shows(name: str) -> None:
    assert_same(TYPES[name], documented()[name], name)


def test_every_command_that_prints_an_object_has_a_type() -> None:
    assert {name.partition(":")[0] for name in documented()} == {name.partition(":")[0] for name in TYPES}


def assert_same(hint: object, shape: object, place: str) -> None:
    """NAME stands for further keys, an item for all items; keys that may be absent need not be shown, nor what may be null."""
    given, hint = hint, without_none(hint)
    if isinstance(shape, dict) and is_typeddict(hint):
        hints, keys = get_type_hints(hint), shape.keys() - {"NAME"}
        assert keys <= hints.keys(), f"{place}: {keys - hints.keys()} have no type"
        unshown = hint.__required_keys__ - keys
        assert "NAME" in shape or not unshown, f"{place}: {unshown} are not shown"
        for key in keys:
            assert_same(hints[key], shape[key], f"{place}: {key}")
    elif isinstance(shape, dict):
        assert issubclass(get_origin(hint), Mapping), f"{place}: {hint}"
        for key in shape:
            assert_same(get_args(hint)[1], shape[key], f"{place}: {key}")
    elif isinstance(shape, list):
        assert issubclass(get_origin(hint), Sequence), f"{place}: {hint}"
        assert_same(get_args(hint)[0], shape[0], place)
    else:
        assert not is_typeddict(given), f"{place}: {given}"


def without_none(hint: object) -> object:
    if get_origin(hint) not in (Union, UnionType):
        return hint
    (one, *others) = [each for each in get_args(hint) if each is not NoneType]
    return Union[one, *others] if others else one
