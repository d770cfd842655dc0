"""What a contestant is told and what it answers, as files: the same rows, in the same order, for each of them.

Imports nothing of `finetune`: a contestant may run under an interpreter that does not have it.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Job:
    base: str
    """A directory with the model in fp32."""
    rows: str
    """A directory with `tokens.npy`, all rows one behind the other in the order of training, and `offsets.npy`."""
    rows_of_step: int
    steps: int
    max_length: int
    is_lora: bool
    is_bf16: bool
    is_checkpointed: bool
    learning_rate: float
    adapter_seed: int
    is_profiled: bool = False

    def examples(self) -> list[list[np.ndarray]]:
        """The rows of each step, as token ids."""
        tokens = np.load(Path(self.rows, "tokens.npy"), mmap_mode="r")
        offsets = np.load(Path(self.rows, "offsets.npy"))
        rows = [tokens[start:end] for start, end in zip(offsets[:-1], offsets[1:], strict=True)]
        firsts = range(0, self.steps * self.rows_of_step, self.rows_of_step)
        return [rows[first : first + self.rows_of_step] for first in firsts]

    def model(self) -> torch.nn.Module:
        """The base in fp32, with adapters from the same draw for all where the cell has them."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32, attn_implementation="sdpa")
        if not self.is_lora:
            return model
        import peft

        torch.manual_seed(self.adapter_seed)
        settings = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        return peft.get_peft_model(model, settings)


class Answer:
    """The end of each step on the wall clock, its loss and its tokens; written when all are done."""

    def __init__(self, path: Path):
        self.path = path
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self.operators: list[dict] = []
        """Of a profiled step: name, seconds and calls, the most expensive first."""
        self.versions: dict[str, str] = {}
        """Of packages that are no part of the project."""

    def step(self, loss: float, tokens: int) -> None:
        self.ends.append(time.time())
        self.losses.append(loss)
        self.tokens.append(tokens)

    def write(self) -> None:
        self.path.write_text(json.dumps({name: value for name, value in vars(self).items() if name != "path"}))


def given() -> tuple[Job, Answer, list[str]]:
    """From the command line: JOB, ANSWER, and what is left."""
    job, answer, *rest = sys.argv[1:]
    return Job(**json.loads(Path(job).read_bytes())), Answer(Path(answer)), rest


def operators(profile: torch.profiler.profile) -> list[dict]:
    """Seconds that each operator itself took on the CPU, and how often it was called."""
    events = [event for event in profile.key_averages() if event.self_cpu_time_total > 0]
    ranked = sorted(events, key=lambda event: -event.self_cpu_time_total)
    return [{"name": event.key, "seconds": event.self_cpu_time_total / 1e6, "calls": event.count} for event in ranked]
