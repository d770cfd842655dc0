"""The files beside the weights of a package: tokenizer, template, generation config, the base's licence."""

import json
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from finetune.errors import BaseError
from finetune.model import base
from finetune.package.attest import licence
from finetune.package.verify.folder import PROCESSORS

GENERATION = "generation_config.json"


def write(
    directory: Path,
    source: Path,
    tokenizer: PreTrainedTokenizerBase,
    base_directory: Path | None,
    is_adapter: bool = False,
) -> None:
    """Copies them from a checkpoint or a base. `tokenizer` has the template of the training; licence and notices are those of the
    base's folder. An adapter gets the base's config if its tokenizer needs it to open as the right class."""
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    companions = base.Companions(source, template)
    _copy(companions.contents(with_config=False), directory)
    if is_adapter and change_by_loading(directory, tokenizer):
        _copy(companions.contents(with_config=True), directory)
    for file in [*licence.texts(base_directory), *processors(base_directory)] if base_directory else ():
        shutil.copyfile(file, directory / file.name)
    _mend_generation(directory / GENERATION, tokenizer)


def _copy(contents: dict[str, bytes], directory: Path) -> None:
    for name, content in contents.items():
        (directory / name).write_bytes(content)


def change_by_loading(directory: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A difference between the tokenizer in a directory and the one of the training; None if there is none."""
    try:
        loaded = base.load_tokenizer(directory)
    except BaseError as error:
        return error.message
    if found := base.difference(tokenizer, loaded):
        return f"as it is saved, it is opened as {type(loaded).__name__} with other {found}"
    if loaded.chat_template != tokenizer.chat_template:
        return "as it is saved, it has another chat template"
    return None


def processors(directory: Path) -> list[Path]:
    """Copies the files that prepare images, video and sound, for a model that also reads these."""
    return sorted(file for file in directory.glob(PROCESSORS) if file.is_file())


def _mend_generation(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Generation also ends at the tokenizer's end-of-text token: training has taught the model to write it."""
    if not path.is_file() or tokenizer.eos_token_id is None:
        return
    settings = json.loads(path.read_bytes())
    ends = settings.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if ends and tokenizer.eos_token_id not in ends:
        path.write_text(json.dumps(settings | {"eos_token_id": [*ends, tokenizer.eos_token_id]}, indent=2) + "\n")
