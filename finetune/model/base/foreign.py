"""Recognizes other programs' directories without a model, and says how to make a model of them.

It looks at names only. The files beside the weights are pickles, and must never be read.
"""

from pathlib import Path

from finetune.errors import BaseError
from finetune.store.run.directory import PLAN

OWN = ("config.json", "adapter_config.json", "manifest.json", PLAN)  # a model, an adapter, a checkpoint, a run


def refuse(text: str) -> None:
    """Refuses a directory of a known other program that is not a model; returns for anything else."""
    path = Path(text)
    if path.is_dir() and not any((path / name).exists() for name in OWN) and (known := describe(path)):
        raise BaseError(known[0], where=text, hint=known[1])


def describe(path: Path) -> tuple[str, str] | None:
    """Names a directory without a model's config or safetensors weights, and says what to do; None if it is unknown."""
    for patterns, what, hint in (
        (
            ("*.distcp", "*/*.distcp"),
            "is a sharded checkpoint (FSDP, torch DCP)",
            "merge it with `accelerate merge-weights`, and put config.json and the tokenizer's files beside the result",
        ),
        (
            ("zero_to_fp32.py", "*/*zero_pp_rank*"),
            "is a DeepSpeed checkpoint",
            "merge it with its zero_to_fp32.py and --safe_serialization, and put config.json and the tokenizer's files beside it",
        ),
        (
            ("random_states_*.pkl",),
            "is a state of accelerate (`save_state`), without config and tokenizer",
            "copy the model's config.json and tokenizer files beside its model.safetensors",
        ),
    ):
        if any(found for pattern in patterns for found in path.glob(pattern)):
            return what, hint
    return _inside(path) or _pickles(path)


def _inside(path: Path) -> tuple[str, str] | None:
    """A directory with runs or a Trainer's checkpoints one level below."""
    inside = [found.parent for name in OWN for found in path.glob(f"*/{name}")]
    if not inside:
        return None
    newest = max(inside, key=lambda child: int(number) if (number := child.name.rpartition("-")[2]).isdigit() else -1)
    return "holds no model itself", f"name one inside it, like {newest}"


def _pickles(path: Path) -> tuple[str, str] | None:
    pickles = sorted(
        file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for file in path.glob(pattern)
    )
    if not pickles or list(path.glob("*.safetensors")):
        return None
    return f"has only pickles, which are never read: {', '.join(pickles[:3])}", (
        "load it in the program that wrote it and call save_pretrained"
    )
