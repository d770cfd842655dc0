"""What many saves take on the disk, hard links counted once, beside what transformers' Trainer writes for the same model."""

import shutil
from pathlib import Path

import torch
from figures import OURS, Goal, Part, Quantity
from training import KEEP_ALL, Shape, Work, opened, write_recipe

from finetune.model import base
from finetune.plan.plan import Plan
from finetune.store.checkpoints import pruning

TRAINER = "transformers' Trainer"
WORK = Work(rows=1, tokens=32)
PARTS_TRAINED = (12, 4)  # one layer in N, the last ones; the embeddings are frozen too
SHARE_LIMIT, LORA_LIMIT = 0.2, 1.1


def sizes(work: Path, shape: Shape, saves: int) -> Part:
    """Each run once as it was saved, and once with all but two of its checkpoints demoted to weights."""
    part = Part(
        [Quantity(f"bytes on the disk after {saves} saves", "MB"), Quantity("share of the Trainer's bytes", "%")], []
    )
    for one_in in PARTS_TRAINED:
        _frozen(work, shape, max(1, shape.layers // one_in), saves, part)
    run, _, plan = _saved(work, "lora", shape, {"name": "lora"}, saves)
    lora = _disk_bytes(run / "checkpoints") / saves / (12 * plan.trainable_parameters)  # weight and two moments, fp32
    shutil.rmtree(run)
    part.goals.append(Goal("LoRA: a checkpoint's bytes over its trainable ones with moments", lora, LORA_LIMIT, ""))
    return part


def _frozen(work: Path, shape: Shape, trained: int, saves: int, part: Part) -> None:
    name, (total, share) = f"the last {trained} of {shape.layers} layers trained", part.quantities
    freeze = ["model.embed_tokens.*", *(f"model.layers.{number}.*" for number in range(shape.layers - trained))]
    run, base_directory, plan = _saved(work, f"trained-{trained}", shape, {"name": "frozen", "freeze": freeze}, saves)
    trainer = saves * _trainer_bytes(work / "trainer", base_directory, freeze)
    all_full, all_but_two = f"{OURS}, {name}, all full", f"{OURS}, {name}, two full, the others weights"
    total.samples |= {f"{TRAINER}, {name}": [trainer], all_full: [_disk_bytes(run)]}
    pruning.prune(run, {"last": 2, "weights_every": 1}, is_dry_run=False)
    total.samples[all_but_two] = [_disk_bytes(run)]
    for kept in (all_full, all_but_two):
        share.samples[kept] = [total.median(kept) / trainer]
    part.facts[f"share of parameters trained, {name}"] = round(plan.trainable_parameters / plan.total_parameters, 3)
    for kept in (all_full, all_but_two):
        goal = f"{saves} saves, {kept.removeprefix(f'{OURS}, ')}: share of the Trainer's bytes"
        part.goals.append(Goal(goal, share.median(kept), SHARE_LIMIT, "%"))
    shutil.rmtree(run)


def _saved(work: Path, name: str, shape: Shape, adapter: dict, saves: int) -> tuple[Path, Path, Plan]:
    """A run with a save at each step, its base and its plan."""
    recipe, run = write_recipe(work / f"{name}.yaml", shape, WORK, adapter, keep=KEEP_ALL), work / name
    with opened(recipe, run) as training:
        for _ in range(saves):
            training.step()
            training.recorder.commit(training.state)
        return run, training.base_directory, training.plan


def _trainer_bytes(directory: Path, base_directory: Path, freeze: list[str]) -> int:
    """One real checkpoint of the Trainer: its second, when there are moments."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from finetune.model.adapters import apply
    from finetune.recipe.schema import FrozenAdapter

    model = apply(base.load_model(base_directory), FrozenAdapter(name="frozen", freeze=freeze))
    tokens = torch.arange(WORK.tokens)
    arguments = TrainingArguments(
        str(directory),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": tokens, "labels": tokens}])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    size = _disk_bytes(directory / "checkpoint-2")
    shutil.rmtree(directory)
    return size


def _disk_bytes(directory: Path) -> int:
    """As `du` counts: blocks, each file once however many names it has."""
    files = [path.stat() for path in directory.rglob("*") if path.is_file()]
    return sum({file.st_ino: 512 * file.st_blocks for file in files}.values())
