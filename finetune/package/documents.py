"""The documents of a package: the record of its training, the card, the bill of materials, the provenance."""

import json
from pathlib import Path

from finetune.package.attest import bom, provenance
from finetune.package.card import figures, record
from finetune.package.card.card import card
from finetune.package.card.facts import Facts
from finetune.package.verify.contents import CARD, files_of
from finetune.recipe.load import to_yaml
from finetune.store.run.directory import JOURNAL, RECIPE, RunDirectory


def write_record(facts: Facts, directory: Path) -> None:
    training = directory / "training"
    training.mkdir()
    (training / RECIPE).write_text(record.recipe(facts.plan), encoding="utf-8")
    (training / JOURNAL).write_text(record.to_lines(facts.figures), encoding="utf-8")
    (training / "loss.png").write_bytes(record.loss_curve(facts.figures))
    (directory / CARD).write_text(card(facts), encoding="utf-8")
    if entries := figures.eval_results(facts.figures, facts.manifest.step, facts.plan):
        (directory / ".eval_results").mkdir()
        (directory / ".eval_results/held-out.yaml").write_text(to_yaml(entries), encoding="utf-8")


def write_attestations(facts: Facts, architectures: list[str] | None, run: Path, directory: Path) -> None:
    """The bill of materials and the provenance, over all files that are there by now."""
    _write_bom(facts, architectures, directory)
    statement = provenance.statement(facts, files_of(directory), RunDirectory(run).plan()[1].get("software", {}))
    (directory / provenance.FILE).write_text(provenance.to_line(statement), encoding="utf-8")


def _write_bom(facts: Facts, architectures: list[str] | None, directory: Path) -> None:
    files = {name: path for name, path in files_of(directory).items() if name != CARD}
    name = facts.plan.recipe.publish.repo if facts.plan.recipe.publish else facts.plan.plan_id
    value = bom.bom(facts, name, (architectures or ["unknown"])[0], files)
    (directory / bom.FILE).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
