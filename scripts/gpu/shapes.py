"""Random models of known shapes, rows of bytes, and recipes over them: nothing is downloaded, and nothing learned means anything.

`shapes.py FOLDER NAME [tiny]` makes a model in a separate process: its device memory is free again when it ends.
"""

import json
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

RANK = 16
LETTERS = "abcdefgh ijklmnop"


class Shape(NamedTuple):
    kind: str
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    key_heads: int
    head_size: int
    is_tied: bool

    def flops_a_token(self, is_lora: bool) -> int:
        """Of forward and backward; attention and what is computed twice do not count."""
        queries, keys = self.heads * self.head_size, self.key_heads * self.head_size
        linear = self.hidden * (queries + 2 * keys) + queries * self.hidden + 3 * self.hidden * self.intermediate
        weights = self.layers * linear + self.vocabulary * self.hidden
        if not is_lora:
            return 6 * weights
        sides = (self.hidden + queries) + 2 * (self.hidden + keys) + (queries + self.hidden)
        sides += 3 * (self.hidden + self.intermediate)
        return 4 * weights + 6 * RANK * self.layers * sides


# SmolLM2-135M, Qwen3-1.7B, Llama-3.1-8B
SHAPES = {
    "small": Shape("llama", 30, 576, 1536, 49152, 9, 3, 64, True),
    "middle": Shape("qwen3", 28, 2048, 6144, 151936, 16, 8, 128, True),
    "large": Shape("llama", 32, 4096, 14336, 128256, 32, 8, 128, False),
}
TINY = {
    name: shape._replace(layers=2, hidden=64, intermediate=128, vocabulary=512, heads=4, key_heads=2, head_size=16)
    for name, shape in SHAPES.items()
}


class Workshop:
    """Where models, rows and recipes are made, once each."""

    def __init__(self, directory: Path, is_tiny: bool):
        self.directory = directory
        self.shapes = TINY if is_tiny else SHAPES
        self.length = 64 if is_tiny else 2048
        self.is_tiny = is_tiny

    def base(self, name: str) -> Path:
        """Where a model is, or will be; `made` lies in it once it is whole."""
        return self.directory / "models" / name

    def make(self, name: str) -> None:
        """A model in bf16, as such models are published, with a tokenizer of bytes."""
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        directory = self.base(name)
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(self.config(name), dtype=torch.bfloat16)
        logging.disable_progress_bar()
        model.save_pretrained(directory, max_shard_size="4GB")
        byte_tokenizer().save_pretrained(directory)
        (directory / "made").touch()

    def config(self, name: str) -> "PretrainedConfig":
        from transformers import AutoConfig

        shape = self.shapes[name]
        return AutoConfig.for_model(
            shape.kind,
            num_hidden_layers=shape.layers,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            vocab_size=shape.vocabulary,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_heads,
            head_dim=shape.head_size,
            tie_word_embeddings=shape.is_tied,
            max_position_embeddings=8192,
            eos_token_id=0,
            pad_token_id=0,
            bos_token_id=None,
        )

    def rows(self, count: int, is_mixed: bool = False) -> Path:
        """Rows that fill the length, or of lengths as chats have them."""
        file = self.directory / f"rows-{count}-{'mixed' if is_mixed else 'full'}.jsonl"
        if not file.exists():
            draw = random.Random(0)
            texts = []
            for _ in range(count):
                length = self.length - 1
                if is_mixed:
                    length = min(length, max(16, int(draw.lognormvariate(6.0, 0.8))))
                texts.append("".join(draw.choices(LETTERS, k=length)))
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return file

    def recipe(self, path: Path, name: str, *, rows: int, is_mixed: bool = False, **sections: dict) -> Path:
        """A recipe over one of the models; sections are merged into what all have in common."""
        parts = {
            "base": {"checkpoint": str(self.base(name))},
            "task": {"name": "text", "max_length": self.length},
            "data": {"train": [{"path": str(self.rows(rows, is_mixed))}]},
            "optimizer": {"learning_rate": 1e-5, "schedule": "constant", "warmup": 0},
            "checkpoint": {"every": "1000 steps"},
            "guard": {"spike": "ignore"},
        }
        for section, keys in sections.items():
            parts[section] = parts.get(section, {}) | keys
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{section}: {json.dumps(keys)}\n" for section, keys in parts.items()))
        return path


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(["<end>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


if __name__ == "__main__":
    Workshop(Path(sys.argv[1]), "tiny" in sys.argv[3:]).make(sys.argv[2])
