"""The rows of a recipe, opened to be looked at: tokenizer and template of its base, and no weights."""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.data import preflight
from finetune.data.example import Row
from finetune.data.refusals import listed
from finetune.data.sources.open import Rows, open_source
from finetune.errors import DataError, FinetuneError
from finetune.model import base
from finetune.recipe.load import LoadedRecipe
from finetune.recipe.schema import Source
from finetune.training.encoding import Encoding, encoding_of


@dataclass(frozen=True)
class OpenedSource:
    key: str
    """Like `data.train[0]`."""
    source: Source
    rows: Rows
    first: int
    """The number of its first row, counted through the training sources, then through the held-out ones."""

    @property
    def is_held_out(self) -> bool:
        return not self.key.startswith("data.train")

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + len(self.rows))


@dataclass(frozen=True)
class RecipeRows:
    """Row numbers count through all sources, the training sources first, as in `bisect` and `replay`."""

    sources: Sequence[OpenedSource]
    unopened: Sequence[DataError] = ()

    def __len__(self) -> int:
        return sum(len(opened.rows) for opened in self.sources)

    @property
    def trained(self) -> int:
        """Rows of the training sources."""
        return sum(len(opened.rows) for opened in self.sources if not opened.is_held_out)

    def of(self, number: int) -> OpenedSource:
        for opened in self.sources:
            if number in opened.numbers:
                return opened
        raise DataError(f"there is no row {number:,}", hint=f"the rows are 0 to {len(self) - 1:,}")

    def __getitem__(self, number: int) -> Row:
        opened = self.of(number)
        return opened.rows[number - opened.first]

    def where(self, number: int) -> str:
        opened = self.of(number)
        return opened.rows.where(number - opened.first)

    def named(self, name: str | None) -> Sequence[OpenedSource]:
        """The sources with this key, path or data set; all training sources without a name."""
        if name is None:
            return [opened for opened in self.sources if not opened.is_held_out]
        if found := [opened for opened in self.sources if name in (opened.key, opened.source.place)]:
            return found
        hint = f"the sources are {listed(opened.key for opened in self.sources)}, or their files"
        raise FinetuneError(f"no source `{name}`", hint=hint)


def open_rows(loaded: LoadedRecipe, is_first_read: bool = True) -> RecipeRows:
    """Opens all sources. Without `is_first_read` a bad first row is no error, and the reasons of unreadable sources are `unopened`."""
    preflight.check_fields(loaded)
    form, skips_bad = loaded.recipe.task.row_form, loaded.recipe.data.on_bad_row == "skip"
    opened: list[OpenedSource] = []
    unopened: list[DataError] = []
    first = 0
    for key, source in preflight.named_sources(loaded):
        try:
            rows = open_source(source, form=form, skips_bad=skips_bad, is_first_read=is_first_read)
        except DataError as error:
            if is_first_read:
                raise
            unopened += error.parts or [error]
            continue
        opened.append(OpenedSource(key, source, rows, first))
        first += len(rows)
    return RecipeRows(opened, unopened)


def open_encoding(loaded: LoadedRecipe) -> Encoding:
    """The tokenizer of the recipe's base, and the template in force."""
    recipe = loaded.recipe
    directory = base.directory(recipe.base, base.pin(recipe.base, recipe.is_adapted), with_weights=False)
    return encoding_of(recipe, directory, base.load_tokenizer(directory), None, None, None)
