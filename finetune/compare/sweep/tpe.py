"""Optuna's TPE sampler (Bergstra et al. 2011) chooses the settings of the next trial, from the results of those before.

Optuna keeps its study in its own storage, a journal file in the sweep directory, which its dashboard can read. The sweep's records count:
what a kill has left in the study without a record is failed there, and is not seen by the sampler.
"""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from finetune.compare.sweep.directory import Sweep, Trial
from finetune.compare.sweep.queue import loss_of
from finetune.compare.sweep.space import Axis, Values
from finetune.errors import FinetuneError
from finetune.recipe.yaml_nodes import Plain

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

NAME = "sweep"


def optuna() -> ModuleType:
    """The library, quiet; FinetuneError where it is not installed."""
    try:
        import optuna
    except ImportError:
        hint = "pip install 'finetune[optuna]', or search with --random N"
        raise FinetuneError("--tpe needs Optuna, which is not installed", where="--tpe", hint=hint) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def ask(sweep: Sweep, take_over: bool = False) -> Trial | None:
    """The next trial, recorded; None if all are there, or another worker is just asking. `take_over`: see `lease.acquire`."""
    claim = sweep.claim("next", take_over)
    if claim is None:
        return None
    with claim:
        trials, spec = sweep.trials(), sweep.spec
        number = len(trials)
        if number >= spec.trials:
            return None
        study = _study(sweep.optuna, spec.seed + number)
        _tell(study, trials)
        asked = study.ask({key: _distribution(axis) for key, axis in spec.space.items()})
        asked.set_user_attr("trial", number)
        settings = {key: _value(axis, asked.params[key]) for key, axis in spec.space.items()}
        trial = Trial(number, settings, {})
        sweep.write(trial)
        return trial


def conclude(sweep: Sweep) -> None:
    """Brings Optuna's storage to the last results."""
    if claim := sweep.claim("next"):
        with claim:
            _tell(_study(sweep.optuna, sweep.spec.seed), sweep.trials())


def _study(storage: Path, seed: int) -> "Study":
    """The study, with a sampler that depends on the trial it is asked for, and not on how many this process has asked for."""
    library = optuna()
    if storage.exists():  # a kill may have torn the last line, and Optuna would write on in it
        data = storage.read_bytes()
        with storage.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
    # Optuna's own lock would outlive a kill.
    backend = library.storages.journal.JournalFileBackend(str(storage), _Held())
    return library.create_study(
        storage=library.storages.JournalStorage(backend),
        study_name=NAME,
        sampler=library.samplers.TPESampler(seed=seed, constant_liar=True),
        load_if_exists=True,
    )


class _Held:
    """A lock for Optuna: the claim is held already."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def _tell(study: "Study", trials: Mapping[int, Trial]) -> None:
    """Brings the study to what is recorded."""
    states = optuna().trial.TrialState
    for asked in study.get_trials(deepcopy=False):
        trial = trials.get(asked.user_attrs.get("trial", -1))
        if asked.state.is_finished() or (trial and not trial.is_finished and not trial.reason):
            continue
        loss = loss_of(trial.results[trial.step]) if trial and trial.is_finished else None
        if loss is None or loss == float("inf"):
            study.tell(asked.number, state=states.FAIL)
        else:
            study.tell(asked.number, loss)


def _distribution(axis: Axis) -> "BaseDistribution":
    kinds = optuna().distributions
    if isinstance(axis, Values):
        return kinds.CategoricalDistribution([*range(len(axis.values))])  # their places: a value may be a list
    if axis.kind == "int":
        return kinds.IntDistribution(int(axis.low), int(axis.high))
    return kinds.FloatDistribution(axis.low, axis.high, log=axis.kind == "log")


def _value(axis: Axis, drawn: int | float) -> Plain:
    if isinstance(axis, Values):
        return axis.values[int(drawn)]
    return drawn if axis.kind == "int" else axis.rounded(drawn)
