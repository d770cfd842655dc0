"""Tasks of lm-evaluation-harness on anything a ref can name: its HFLM gets our opened model and tokenizer, and each sample is kept."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import blake3
import numpy as np

from finetune import version
from finetune.compare.results import Result, Weights, keep, weights_of
from finetune.data.heldout.lineage import Found
from finetune.errors import FinetuneError, explained
from finetune.plan.facts import Metrics
from finetune.store import evaluations
from finetune.store.checkpoints.refs import parse, run_of
from finetune.store.evaluations import SCHEMA, About, Evaluation, Measure
from finetune.store.run.directory import RunDirectory
from finetune.store.run.journal import now

PACKAGE = "lm_eval"
BATCH_SIZE = 8
ENDINGS = (".yaml", ".yml")


def results(texts: Sequence[str], tasks: Sequence[str], is_again: bool = False) -> list[Result]:
    """One for each ref and task; of a group, one for each of its tasks. A task is a name that the harness knows, or the path of its YAML
    file. FinetuneError without the package, or for an unknown task."""
    return [result for text in texts for task in tasks for result in _of_task(text, task, is_again)]


def _of_task(text: str, task: str, is_again: bool) -> list[Result]:
    weights, trained = _weights(text)
    try:
        settings = trained | {PACKAGE: version(PACKAGE), "task": _definition(task)}
    except ModuleNotFoundError:
        hint = "pip install 'finetune[lm-eval]'"
        raise FinetuneError("needs the package lm-eval", where=f"--lm-eval {task}", hint=hint) from None
    known = [] if is_again else _known(weights, settings)
    made = known or [keep(weights, each) for each in _evaluated(text, task, weights, settings)]
    return [Result(text, each.about["set"], each, Found((), None), is_stored=bool(known)) for each in made]


def _weights(text: str) -> tuple[Weights, dict[str, str]]:
    """Of a ref, with the settings that it is opened with."""
    ref = parse(text)
    run = run_of(ref)
    if run:
        plan, _ = RunDirectory(run).plan()
        recipe = plan.recipe
        trained: dict[str, str] = {"weights": recipe.train.weights, "quantization": recipe.base.quantization or "none"}
        return weights_of(ref, run, plan)[1], trained
    from finetune.compare.measure import weights_at  # here: it imports torch

    return weights_at(ref, None, None), {"weights": "fp32", "quantization": "none"}


def _definition(task: str) -> str:
    """What a task is: its name, or the content of its file. The version of the package is a setting as well."""
    file = Path(task)
    return f"blake3:{blake3.blake3(file.read_bytes()).hexdigest()}" if _is_file(task) else task


def _is_file(task: str) -> bool:
    return task.endswith(ENDINGS) and Path(task).is_file()


def _known(weights: Weights, settings: Mapping[str, str]) -> list[Evaluation]:
    """The evaluations of all tasks of a group, or none."""
    found = []
    for each in evaluations.read_all(weights.folder):
        own = dict(each.about["settings"])
        count = own.pop("tasks", "0")
        if own == settings and each.about["model"] == weights.digest:
            found.append((each, int(count)))
    is_whole = bool(found) and len(found) == found[0][1]
    return [each for each, _ in found] if is_whole else []


def _evaluated(text: str, task: str, weights: Weights, settings: Mapping[str, str]) -> Iterator[Evaluation]:
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from finetune.training.opened import open_model, open_tokenizer

    with explained("the harness cannot read its tasks", f"--lm-eval {task}", "fix the file", FinetuneError):
        manager = TaskManager(include_path=str(Path(task).parent) if _is_file(task) else None)
        name = _name_in(Path(task)) if _is_file(task) else task
    if name not in manager.all_tasks:
        hint = "`lm-eval ls tasks` lists the names; a file ends with .yaml"
        raise FinetuneError("is no task of lm-eval", where=f"--lm-eval {task}", hint=hint)
    opened = open_model(text, device=torch.accelerator.current_accelerator(check_available=True))
    began = time.monotonic()
    with explained("lm-eval cannot evaluate it", text, "run the task with lm-eval alone", FinetuneError):
        model = HFLM(pretrained=opened.model, tokenizer=open_tokenizer(opened), batch_size=BATCH_SIZE)
        found = simple_evaluate(model, tasks=[name], task_manager=manager, log_samples=True, bootstrap_iters=0)
    samples = {task: some for task, some in found["samples"].items() if some}
    seconds = round((time.monotonic() - began) / max(len(samples), 1), 3)
    for one in samples:
        made = _evaluation(text, one, found, weights, {**settings, "tasks": str(len(samples))})
        yield replace(made, about=cast(About, {**made.about, "seconds": seconds}))


def _name_in(file: Path) -> str:
    from ruamel.yaml import YAML

    return str((YAML(typ="safe", pure=True).load(file) or {}).get("task", file.stem))


def _evaluation(
    text: str, task: str, found: Mapping[str, Any], weights: Weights, settings: dict[str, str]
) -> Evaluation:
    samples = found["samples"][task]
    filters = dict.fromkeys(sample["filter"] for sample in samples)
    by_filter = {name: [sample for sample in samples if sample["filter"] == name] for name in filters}
    columns: dict[str, np.ndarray] = {}
    measures: dict[str, Measure] = {}
    for name, some in by_filter.items():
        for metric in some[0]["metrics"]:
            values = [sample.get(metric) for sample in some]
            if all(
                isinstance(value, bool | int | float) for value in values
            ):  # others are reduced by the harness alone
                column = _named(metric, name)
                columns[column] = np.array(values, dtype=np.float64)
                is_higher = found["higher_is_better"].get(task, {}).get(metric, True)
                measures[column] = {"per": "rows", "better": "higher" if is_higher else "lower"}
    first = next(iter(by_filter.values()))
    answers = [sample["filtered_resps"][0] for sample in first]
    hashes = [int(sample["doc_hash"][:16], 16) for sample in first]
    version_of_task = [task, found["versions"].get(task), found["n-shot"].get(task)]
    data = blake3.blake3(json.dumps([PACKAGE, version_of_task, hashes]).encode()).hexdigest()
    return Evaluation(
        {
            "schema": SCHEMA,
            "ref": text,
            "model": weights.digest,
            "data": f"blake3:{data}",
            "set": task,
            "task": PACKAGE,
            "settings": settings,
            "measures": measures,
            "metrics": _figures(found["results"][task]),
            "created": now(),
            "seconds": 0.0,
        },
        np.array(hashes, dtype=np.uint64),
        np.array([sample["doc_id"] for sample in first], dtype=np.int64),
        np.ones(len(first), dtype=np.int64),
        columns,
        answers if all(isinstance(answer, str) for answer in answers) else None,
    )


def _figures(results: Mapping[str, object]) -> Metrics:
    """The harness names a figure `acc,none`, where `none` is the filter of the answers."""
    figures = {}
    for key, value in results.items():
        metric, _, name = key.partition(",")
        if name and isinstance(value, int | float) and math.isfinite(value):
            figures[_named(metric, name)] = float(value)
    return figures


def _named(metric: str, name: str) -> str:
    return metric if name == "none" else f"{metric},{name}"
