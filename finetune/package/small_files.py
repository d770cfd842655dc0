"""Floor 7. What goes with the weights of a package: tokenizer, template, generation config, the base's licence. `export` writes it,
`preflight` looks before the training whether it could.
"""

import json
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from finetune.checkpoints.snapshot import companions
from finetune.model import base
from finetune.package import licence

GENERATION = "generation_config.json"


def write(directory: Path, source: Path, template: str | None, base_directory: Path | None) -> None:
    """Copies them from a checkpoint or a base. `template` is what is trained with; licence and notices are those of the base's folder."""
    for file in companions(source):
        shutil.copyfile(file, directory / file.name)
    tokenizer = base.load_tokenizer(source)
    if template != tokenizer.chat_template:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    for file in licence.texts(base_directory) if base_directory else ():
        shutil.copyfile(file, directory / file.name)
    _mend_generation(directory / GENERATION, tokenizer)


def _mend_generation(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Generation also ends at the tokenizer's end-of-text token: training has taught the model to write it."""
    if not path.is_file() or tokenizer.eos_token_id is None:
        return
    settings = json.loads(path.read_bytes())
    ends = settings.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if ends and tokenizer.eos_token_id not in ends:
        path.write_text(json.dumps(settings | {"eos_token_id": [*ends, tokenizer.eos_token_id]}, indent=2) + "\n")
