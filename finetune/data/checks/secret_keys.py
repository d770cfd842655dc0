"""Secrets in rows: a model repeats what it was trained on, so one may reach the users of the model."""

from collections.abc import Iterator

from finetune.data.checks.looked import Looked
from finetune.recipe.secret_forms import secrets_in


def secret_keys(looked: Looked) -> Iterator[str]:
    for part in looked.parts:
        for name, found in secrets_in(part.text):
            yield f"`{part.place}` has {name}: {found[:6]}… ({len(found)} characters)"
