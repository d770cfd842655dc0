"""A package as a bill of materials: CycloneDX 1.6, a machine-learning model with its files, data and ancestor; `export` writes it.

Format: https://cyclonedx.org/docs/1.6/json/. It has no time in it, and its serial number is made of the run and the step. It is written by
hand: cyclonedx-python-lib 11 knows no `modelCard`, which is most of it; a test validates it by the library's schema.
"""

import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from finetune.package.card import figures, record
from finetune.package.card.card import LIMITS
from finetune.package.card.facts import Facts, hub_base, method
from finetune.package.card.metadata import FrontMatter
from finetune.package.verify.contents import sha256
from finetune.plan.facts import Metrics
from finetune.plan.plan import PinnedSource
from finetune.recipe.schema import Source
from finetune.store.run.directory import step_name

FILE = "bom.cdx.json"
NAMESPACE = uuid.UUID("6f0d2a5e-3f0a-5c7e-9a55-0c2f2b1d7a10")  # ours, drawn once
METRICS = {"loss": "cross-entropy, nats per token", "perplexity": "perplexity"}


def bom(facts: Facts, name: str, architecture: str, files: Mapping[str, Path]) -> dict[str, object]:
    """The whole document. `files` are those of the package that the card does not change."""
    step = facts.manifest.step
    datasets = [
        {
            "type": "dataset",
            "name": _name(source, pinned),
            "classification": "training",
            "description": _described(pinned),
        }
        for source, pinned in zip(facts.plan.recipe.data.train, facts.plan.train, strict=True)
    ]
    card = {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": facts.plan.recipe.task.pipeline_tag,
            "modelArchitecture": architecture,
            "datasets": datasets,
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": _metrics(facts)},
        "considerations": {"technicalLimitations": [LIMITS]},
        "properties": [{"name": f"finetune:{key}", "value": value} for key, value in _hyperparameters(facts)],
    }
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name,
        "version": step_name(step),
        "description": f"{method(facts.plan)}, {figures.named(facts.figures, step)}, {facts.form}, {facts.dtype}",
        **_licences(facts.licence),
        "pedigree": {"ancestors": [] if facts.plan.base.kind == "config" else [_ancestor(facts)]},
        "modelCard": card,
    }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, f'{facts.manifest.run}@{step}')}",
        "version": 1,
        "metadata": {"component": model},
        "components": [_file(one, path) for one, path in sorted(files.items())],
        "dependencies": [{"ref": "model", "dependsOn": [f"file:{one}" for one in sorted(files)]}],
    }


def _hyperparameters(facts: Facts) -> Iterator[tuple[str, str]]:
    """What the recipe says of adapter, optimizer and training, its defaults too, and the steps of the plan."""
    recipe = facts.plan.recipe
    for section in ("adapter", "optimizer", "train"):
        if value := getattr(recipe, section):
            yield from ((f"{section}.{key}", json.dumps(item)) for key, item in value.model_dump(mode="json").items())
    yield "steps", str(facts.plan.steps)


def _file(name: str, path: Path) -> dict[str, object]:
    hashes = [{"alg": "SHA-256", "content": sha256(path)}]
    return {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": hashes}


def _ancestor(facts: Facts) -> dict[str, str]:
    hub, base = hub_base(facts.plan), facts.plan.base
    name = hub[0] if hub else record.public_name(facts.plan.recipe.base.checkpoint)
    version = (hub and hub[1]) or base.digest or "unknown"
    return {"type": "machine-learning-model", "bom-ref": "base", "name": name, "version": version}


def _name(source: Source, pinned: PinnedSource) -> str:
    return f"{source.dataset}@{pinned.revision}" if source.dataset else record.public_name(pinned.name)


def _described(pinned: PinnedSource) -> str:
    return f"{pinned.rows} rows, content {pinned.fingerprint}"


def _metrics(facts: Facts) -> list[dict[str, str]]:
    found: Metrics = figures.of_card(facts.figures).get(facts.manifest.step, {})
    return [
        {"type": title, "value": str(found[key]), "slice": figures.kind_of_rows(facts.figures)}
        for key, title in METRICS.items()
        if key in found
    ]


def _licences(licence: FrontMatter | None) -> dict[str, object]:
    """By name: the Hub's ids are not all SPDX's."""
    return {"licenses": [{"license": {"name": licence.get("license_name", licence["license"])}}]} if licence else {}
