"""`doctor` and `schema`: what this machine is, and what a recipe may hold."""

import json
from pathlib import Path

import click

from finetune.cli.answer import Answer, answers
from finetune.cli.options import PATH


@click.command()
@click.argument("file", type=PATH, required=False)
def schema(file: Path | None) -> None:
    """Print the JSON Schema of recipes, or write it to a file."""
    from finetune.recipe.schema import Recipe

    text = json.dumps(Recipe.model_json_schema(), indent=1) + "\n"
    if file:
        file.write_text(text)
    else:
        click.echo(text, nl=False)


@click.command()
@answers
def doctor() -> Answer:
    """Look at this machine: versions, devices, memory, disk."""
    from finetune.hosts import doctor as examination

    facts = examination.facts()
    return Answer(facts, examination.listing(facts))
