"""The training that faults are done to: a tiny recipe, its command line, and what makes two finished runs equal.

    python scripts/faults/training.py DIRECTORY          makes the recipe there, and prints its path
    python scripts/faults/training.py --digest RUN       what two equal finished runs have in common, as one word

The recipe is a random Llama of two layers, 64 rows of text, LoRA with dropout. The other scripts of this folder take any recipe, and
without one they make this.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import blake3
import psutil
from safetensors.numpy import load_file

from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.verify import verify
from finetune.store.run import journal, row_losses

os.environ.setdefault("OMP_NUM_THREADS", "1")  # equal bytes need equal threads, and a tiny model is slower on several
DEADLINE_SECONDS = 600  # of one start of the training
ROWS = 64
ALONE = ("train",)
TWO_RANKS = ("launch", "--nproc-per-node", "2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every script that trains has in common."""
    parser.add_argument("recipe", nargs="?", type=Path, help="a recipe; without one a tiny one is made")
    parser.add_argument("--work", type=Path, required=True, help="a new directory for runs, images and logs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="overrides", action="append", default=[])


def recipe_of(options: argparse.Namespace) -> Path:
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    return options.recipe or tiny_recipe(options.work / "tiny")


def command(recipe: Path, run: Path | str, overrides: Sequence[str] = (), starter: Sequence[str] = ALONE) -> list[str]:
    words = [word for override in overrides for word in ("--set", override)]
    return [sys.executable, "-m", "finetune", *starter, str(recipe), "--run", str(run), "--quiet", *words]


def ranks_of(launcher: subprocess.Popen) -> dict[int, psutil.Process]:
    """The living ranks that a launcher has started."""
    found = {}
    for child in psutil.Process(launcher.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            environment, words = child.environ(), child.cmdline()
            if "RANK" in environment and "train" in words:
                found[int(environment["RANK"])] = child
    return found


def finish(recipe: Path, run: Path, overrides: Sequence[str] = (), starter: Sequence[str] = ALONE) -> list[str]:
    """Trains, or resumes, to the end; a list of one problem where that fails."""
    result = subprocess.run(
        command(recipe, run, overrides, starter), capture_output=True, text=True, timeout=DEADLINE_SECONDS
    )
    return [f"train ended with {result.returncode}: {result.stderr[-600:]}"] if result.returncode else []


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> bool:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def is_saving(run: Path) -> bool:
    attempts = run / "attempts"
    return attempts.is_dir() and any(attempts.iterdir())


def unsound(run: Path, said: str, keep: int) -> list[str]:
    """What is wrong in a run directory that somebody died in, given what the training had printed until then.

    Of the steps that were printed as committed the newest `keep` are there (retention may have had the others); whatever is in a
    checkpoint's place is one, byte for byte, is chosen as the newest, and is not ahead of its journal and row losses.
    """
    store = Store(run)
    present = {checkpoint.step: checkpoint for checkpoint in store.checkpoints()}
    found = [f"{item.path.name} is no checkpoint: {item.damage.message}" for item in store.unreadable()]
    for checkpoint in present.values():
        found += [f"{checkpoint.path.name}: {damage}" for damage in verify(checkpoint.path) if damage.check != "extra"]
    # a kill may come between a commit and its message: then retention counts one that was not printed
    newest_kept = sorted(present)[-keep:] if len(present) >= keep else [0]
    found += [
        f"step {step} was printed as committed and is gone"
        for step in committed(said)[-keep:]
        if step not in present and step >= newest_kept[0]
    ]
    newest = max(present, default=0)
    chosen = store.newest_sound()[0]
    if newest != (chosen.step if chosen else 0):
        found.append(f"the newest checkpoint is {newest}, and {chosen and chosen.step} is chosen")
    missing = set(range(1, newest + 1)) - journal.steps(journal.read(run)).keys()
    missing |= {step for step in range(max(1, newest - 20), newest + 1) if not row_losses.read_rows(run, step)}
    if missing:
        found.append(f"step {newest} is committed, and the records of {sorted(missing)[:5]} are not there")
    return found


def committed(said: str) -> list[int]:
    return [int(step) for step in re.findall(r"^committed step (\d+)$", said, re.MULTILINE)]


def differences(run: Path, other: Path) -> list[str]:
    """Everything in which two finished runs differ, times aside."""
    last = sorted(path.name for path in (run / "checkpoints").iterdir())[-1]
    found = []
    for path in sorted((run / "checkpoints" / last).glob("*.safetensors")):
        if not (other / "checkpoints" / last / path.name).exists():
            return [f"the other run has no {last}/{path.name}"]
        tensors, others = load_file(path), load_file(other / "checkpoints" / last / path.name)
        if tensors.keys() != others.keys():
            found.append(f"{path.name}: other tensors")
        found += [f"{path.name}: {name}" for name in tensors if tensors[name].tobytes() != others[name].tobytes()]
    steps, other_steps = journal.steps(journal.read(run)), journal.steps(journal.read(other))
    if steps.keys() != other_steps.keys():
        found.append("the journals have other steps")
    for step in sorted(steps.keys() & other_steps.keys()):
        if quantity := journal.difference(steps[step], other_steps[step]):
            found.append(f"step {step}: {quantity}")
        if row_losses.read_rows(run, step) != row_losses.read_rows(other, step):
            found.append(f"step {step}: row losses")
    return found


def tiny_recipe(directory: Path) -> Path:
    """A recipe on a random model that trains a step in milliseconds; the same bytes every time."""
    path = directory / "tiny.yaml"
    if path.exists():
        return path
    directory.mkdir(parents=True)
    tiny_base(directory / "base")
    draw = random.Random(0)
    for name, count in (("train", ROWS), ("holdout", ROWS // 8)):
        rows = ["".join(draw.choices("abcdefgh ", k=draw.randrange(8, 60))) + "." for _ in range(count)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    sections = {
        "base": {"checkpoint": str((directory / "base").absolute())},
        "task": {"name": "text", "max_length": 64},
        "data": {name: [{"path": str((directory / f"{name}.jsonl").absolute())}] for name in ("train", "holdout")},
        "adapter": {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
        "optimizer": {"learning_rate": 0.01},
        "train": {"steps": 60, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128},
        "checkpoint": {"every": "4 steps", "keep": {"last": 1000}},
    }
    path.write_text("".join(f"{name}: {json.dumps(section)}\n" for name, section in sections.items()))
    return path


def tiny_base(directory: Path, hidden: int = 32, positions: int = 128) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        eos_token_id=fast.eos_token_id,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    fast.save_pretrained(directory)


def digest(run: Path) -> str:
    """Of every tensor of the last checkpoint, every step's last record, every row's loss, times aside."""
    hashed = blake3.blake3()
    last = sorted((run / "checkpoints").iterdir())[-1]
    for path in sorted(last.glob("*.safetensors")):
        hashed.update(path.name.encode()).update(path.read_bytes())
    for step, record in sorted(journal.steps(journal.read(run)).items()):
        kept = {key: value for key, value in record.items() if journal.difference({}, {key: value})}
        hashed.update(json.dumps([step, kept, row_losses.read_rows(run, step)], sort_keys=True).encode())
    return hashed.hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--digest", action="store_true")
    options = parser.parse_args()
    print(digest(options.directory) if options.digest else tiny_recipe(options.directory))
