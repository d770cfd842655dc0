"""Rows of a Hub data set at a pinned revision; turns the Hub's refusals into errors with a hint."""

from pathlib import Path
from typing import TYPE_CHECKING

from finetune.data.example import Row
from finetune.data.refusals import first_line
from finetune.errors import DataError
from finetune.recipe.schema import Source
from finetune.store import downloads, hub

if TYPE_CHECKING:
    from datasets import Dataset

SPLIT = "train"  # if the recipe names none


def pin_dataset(source: Source) -> str:
    """The current commit of a Hub data set's `revision`; offline, the one seen last. A full commit hash is its own pin."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionResolutionError

    try:
        with hub.waiting(f"which commit the data set {source.dataset} is at"):
            return HfApi().resolve_revision(source.place, repo_type="dataset", revision=source.revision).resolved
    except (hub.http().HTTPError, OSError, ValueError, RevisionResolutionError) as error:
        raise hub_error(source, error) from error


class HubDataset:
    """A split of a Hub data set at one commit, in the cache of `datasets`; a split may be a slice, like `train[:100]`."""

    def __init__(self, source: Source, revision: str):
        from datasets.exceptions import DatasetsError

        self._place = f"{source.dataset}@{revision[:8]} {source.split or SPLIT}"
        try:
            with hub.waiting(f"rows of the data set {source.dataset}"):
                self._rows = _load(source, revision)
        # RuntimeError: the data set is a script
        except (DatasetsError, hub.http().HTTPError, OSError, ValueError, RuntimeError) as error:
            raise hub_error(source, error) from error
        self.kinds = {field.name: field.type for field in self._rows.features.arrow_schema}
        self.about = "a data set"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def where(self, index: int) -> str:
        return f"{self._place} row {index}"


def _load(source: Source, revision: str) -> "Dataset":
    """The split at the pin; without a request, if `datasets` has it in its cache."""
    from datasets import load_dataset
    from datasets.packaged_modules.cache.cache import Cache
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    split, name = source.split or SPLIT, source.place.rpartition("/")[2]
    made = Cache(
        repo_id=source.dataset,
        dataset_name=name,
        config_name=source.name or "default",
        version="0.0.0",
        hash=revision,
    )
    if Path(made.cache_dir).is_dir():
        rows = made.as_dataset(split=split)
    else:
        with hub.without_remarks():  # on a data set without a card
            rows = load_dataset(source.dataset, source.name, split=split, revision=revision)
    if any(Path(file["filename"]).parent.name != revision for file in rows.cache_files):
        raise ConnectionError("without the Hub, `datasets` gives the revision it cached last, whatever was asked for")
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=source.place, repo_type="dataset"))
    made_of_them = next((str(Path(file["filename"]).parent) for file in rows.cache_files), "")
    files = (folder / "snapshots" / revision).rglob("*")
    downloads.refuse_damaged(files, DataError, f"{source.dataset}@{revision}", made_of_them)
    return rows


def hub_error(source: Source, error: Exception) -> DataError:
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError, RevisionResolutionError

    if refusal := downloads.refusal_of_disk(error, DataError, f"HF_HOME={constants.HF_HOME}"):
        return refusal
    hint: str | None
    if "is a gated dataset" in str(error):  # DatasetNotFoundError hides the Hub's own error
        message, hint = "is gated", "ask for access at its page, then set HF_TOKEN"
    elif isinstance(error, RevisionNotFoundError) or isinstance(error.__cause__, RevisionNotFoundError):
        message, hint = (
            f"has no revision `{source.revision}`",
            "correct `revision`, or remove it for the main branch",
        )
    elif isinstance(error, DatasetNotFoundError | RepositoryNotFoundError):
        message, hint = "no such data set on the Hub", "check its name; a private or gated one needs `hf auth login`"
    elif (told := hub.refusal(error)).status is not None:
        message, hint = told.message, told.hint
    elif isinstance(error, ConnectionError | hub.http().TransportError | RevisionResolutionError):
        message, hint = "the Hub cannot be reached", "check the network, or name a local file with `path`"
    else:
        message, hint = f"cannot be loaded: {first_line(error)}", "check `name`, `split` and `revision` in the recipe"
    return DataError(message, where=source.dataset, hint=hint)
