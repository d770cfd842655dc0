"""A new member of a family is two files: a copy of the tree gets a toy of each, and trains with all of them."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from finetune.store.checkpoints.store import Store

ROOT = Path(__file__).parents[2]

Edit = str | Mapping[str, str]
"""The text of a new file, or what is replaced in one that is there, once each."""

GRADE_SECTION = '''class GradeTask(TaskFacts):
    """Texts with a grade; the loss is how far a number that the last token gives is from it, squared."""

    name: Literal["grade"]
    max_length: PositiveInt = 1024
    """Tokens of the longest example."""
    packing: bool = True
    """Several rows in one sequence."""
    scale: float = 1.0
    """Grades are divided by it."""

    row_form: ClassVar = "text"
    more_fields: ClassVar = ("grade",)
    pipeline_tag: ClassVar = "text-classification"
    tags: ClassVar = ("grades",)
    prompt: ClassVar = '"…"'
    figures: ClassVar = {"loss": "held-out squared distance"}


Task = '''

GRADE_TASK = '''"""Texts with a grade: a loss on one number a row, which is not cross-entropy."""

from itertools import accumulate

import numpy as np
import torch

from finetune.data.example import Example
from finetune.data.plain_text import text_of
from finetune.tasks import causal, content
from finetune.tasks.task import Task


def encoder(tokenizer, task, stop_tokens, row_rules=2):
    def encode(rows, places):
        examples = []
        for row, place in zip(rows, places, strict=True):
            tokens = np.array(tokenizer(text_of(row, place))["input_ids"][: task.max_length], dtype=np.int32)
            is_last = np.arange(len(tokens)) == len(tokens) - 1
            examples.append([Example(tokens, is_last, numbers=(row["grade"] / task.scale,))])
        return examples

    return encode


def graded(collate):
    def collate_graded(examples):
        batch = collate(examples)
        lengths = [len(example.tokens) for example in examples]
        longest = batch["model_inputs"]["input_ids"].shape[1]
        is_packed = "row_bounds" in batch["model_inputs"]
        ends = accumulate(lengths) if is_packed else (row * longest + each for row, each in enumerate(lengths))
        return {
            "model_inputs": batch["model_inputs"],
            "last_R": torch.tensor([end - 1 for end in ends]),
            "grades_R": torch.tensor([example.numbers[0] for example in examples], dtype=torch.float32),
        }

    return collate_graded


def loss(model, batch, token_losses):
    logits = model(**batch["model_inputs"], use_cache=False).logits.flatten(0, 1)
    squares_R = (logits[batch["last_R"], 0].float() - batch["grades_R"]) ** 2
    return squares_R.sum(), squares_R.detach()


def score(results):
    return {"loss": results.sums.mean().item(), "rows": len(results.rows), "tokens": int(results.tokens.sum())}


def says(row):
    return [row.get("text"), row.get("grade")]


TASK = Task(encoder, says, graded(causal.collate_packed), graded(causal.collate_padded), loss, score)
'''

DORA_SECTION = '''class DoraAdapter(LoraAdapter):
    """LoRA with a magnitude beside each matrix (Liu et al. 2024, arXiv 2402.09353)."""

    name: Literal["dora"]

    title: ClassVar = "DoRA"
    tags: ClassVar = ("dora",)
    tensors_beside_a_matrix: ClassVar = 3


Adapter = '''

DORA = '''"""DoRA, which peft has."""

from functools import partial

from finetune.model.adapters.lora import put_on, skipped
from finetune.model.adapters.member import Member

MEMBER = Member(partial(put_on, use_dora=True), skipped)
'''

LION = '''"""Lion (Chen et al. 2023, arXiv 2302.06675): the sign of a mean of gradients."""

import torch

from finetune.model.optimizer.member import Member


class Lion(torch.optim.Optimizer):
    def __init__(self, groups, betas):
        super().__init__(groups, {"lr": 0.0, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                slots = self.state[parameter]
                mean = slots.setdefault("exp_avg", torch.zeros_like(parameter))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(torch.sign(torch.lerp(parameter.grad, mean, first)), alpha=group["lr"])
                mean.lerp_(parameter.grad, 1 - second)


MEMBER = Member(lambda trained, settings: Lion(trained.groups, settings.lion_betas))
'''

TRAPEZOID = '''def trapezoid(progress: float, *, ramp: float) -> float:
    """Stays, and falls in the last part of the steps."""
    return min(1.0, (1.0 - progress) / ramp)


# progress in [0, 1]'''

LINES_SECTION = '''class LinesTracker(TrackerFacts):
    """A line a step, in a file of your choice."""

    name: Literal["lines"]
    path: str
    """Where."""


class _OrName:'''

LINES = '''"""A line a step."""

from pathlib import Path


class Lines:
    had = None

    def __init__(self, about, path):
        self.path, self.place = path, str(path)
        self.say(f"start {about.id}")

    def back_to(self, step):
        lines = self.path.read_text().splitlines()
        self.path.write_text("")
        for line in lines:
            if not line.split()[0].isdecimal() or int(line.split()[0]) <= step:
                self.say(line)

    def say(self, line):
        with self.path.open("a") as file:
            print(line, file=file)

    def log(self, step, figures, time):
        self.say(f"{step} {' '.join(figures)}")

    def note(self, step, kind, text, time):
        self.say(f"{kind} at {step}")

    def flush(self):
        pass

    def finish(self):
        self.say("finish")


def start(about):
    return Lines(about, Path(about.settings("lines").path))
'''

MEMBERS: dict[str, dict[str, Edit]] = {
    "task": {
        "recipe/schema/tasks.py": {"Task = ": GRADE_SECTION, "ChatTask | TextTask": "ChatTask | TextTask | GradeTask"},
        "tasks/grade.py": GRADE_TASK,
    },
    "adapter": {
        "recipe/schema/adapters.py": {
            "Adapter = ": DORA_SECTION,
            "LoraAdapter | FrozenAdapter": "LoraAdapter | FrozenAdapter | DoraAdapter",
        },
        "model/adapters/dora.py": DORA,
    },
    "optimizer": {
        "recipe/schema/optimizers.py": {
            'Literal["adamw", ': 'Literal["adamw", "lion", ',
            "    momentum: float": '    lion_betas: Betas = (0.9, 0.99)\n    """Of Lion."""\n    momentum: float',
            '    "sgd": O': '    "lion": OptimizerFacts(lambda settings: 4, ("lion_betas",)),\n    "sgd": O',
        },
        "model/optimizer/lion.py": LION,
    },
    "tracker": {
        "recipe/schema/trackers.py": {
            "class _OrName:": LINES_SECTION,
            "    CsvTracker | Tensor": "    LinesTracker | CsvTracker | Tensor",
        },
        "training/trackers/lines.py": LINES,
    },
    "schedule": {
        "recipe/schema/optimizers.py": {
            '"linear", "cosine"]': '"linear", "cosine", "trapezoid"]',
            "    warmup: Count": '    ramp: float = Field(default=0.2, gt=0, le=1)\n    """Of trapezoid."""\n    warmup: Count',
            '    "linear": S': '    "trapezoid": ScheduleFacts(("ramp",)),\n    "linear": S',
        },
        "plan/schedules.py": {
            "# progress in [0, 1]": TRAPEZOID,
            '    "linear": lambda progress': '    "trapezoid": trapezoid,\n    "linear": lambda progress',
        },
    },
}


def add(member: Mapping[str, Edit], tree: Path) -> None:
    for name, edit in member.items():
        file = tree / "finetune" / name
        if isinstance(edit, str):
            assert not file.exists(), name
            file.write_text(edit)
            continue
        text = file.read_text()
        for old, new in edit.items():
            assert text.count(old) == 1, f"{name} has {text.count(old)} times {old!r}"
            text = text.replace(old, new)
        file.write_text(text)


def finetune(tree: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line of a tree, in a new interpreter: a fork would have the modules of ours."""
    command = [sys.executable, "-m", "finetune", *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(tree)}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=240)


def contents(tree: Path) -> dict[str, str]:
    return {str(file.relative_to(tree)): file.read_text() for file in tree.rglob("*.py")}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with a toy member of each family."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "finetune", tree / "finetune", ignore=shutil.ignore_patterns("__pycache__"))
    for family, member in MEMBERS.items():
        before = contents(tree)
        add(member, tree)
        after = contents(tree)
        changed = {name for name in after if after[name] != before.get(name)}
        assert len(changed) <= 2 and before.keys() <= after.keys(), f"{family}: {changed}"
    return tree


@pytest.fixture
def toy_recipe(tmp_path: Path, tiny_base: Path) -> dict:
    for name, count in (("train", 24), ("holdout", 6)):
        rows = ({"text": f"the model reads {number} rows", "grade": number % 5} for number in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "base": {"checkpoint": str(tiny_base)},
        "task": {"name": "grade", "max_length": 64, "scale": 2.0},
        "data": {part: [{"path": str(tmp_path / f"{part}.jsonl")}] for part in ("train", "holdout")}
        | {"allow": "seen_holdout"},
        "adapter": {"name": "dora", "rank": 2, "alpha": 4},
        "optimizer": {"name": "lion", "learning_rate": 0.01, "schedule": "trapezoid", "ramp": 0.5, "warmup": 0},
        "train": {"steps": 8, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128},
        "checkpoint": {"every": "4 steps"},
        "track": [{"name": "lines", "path": str(tmp_path / "lines.txt")}],
    }


@pytest.mark.slow
def test_toy_members_of_two_files_each_train_together(tree, toy_recipe, tmp_path) -> None:
    recipe, run = tmp_path / "toy.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(toy_recipe))
    for until in (("--until", 4), ()):
        done = finetune(tree, "train", recipe, "--run", run, *until)
        assert done.returncode == 0, done.stderr
    assert "resumed from step 4" in done.stderr

    records = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    assert [step["step"] for step in steps] == [*range(1, 9)] and all(math.isfinite(step["loss"]) for step in steps)
    assert [round(step["learning_rate"], 6) for step in steps] == [0.01] * 5 + [0.0075, 0.005, 0.0025], "trapezoid"
    losses = {each["step"]: each["loss"] for each in records if each.get("event") == "evaluated"}
    assert losses[8] < losses[0], "what is learnt is the grade"

    started, *lines = (tmp_path / "lines.txt").read_text().splitlines()
    identity = started.split()[1]
    assert lines.count(started) == 1 and identity == json.loads((run / "plan.json").read_text())["facts"]["run"], (
        "the tracker"
    )
    assert [line for line in lines if " at " in line] == [
        "started at 0",
        "committed at 4",
        "started at 4",
        "committed at 8",
    ]
    assert [line.split()[0] for line in lines if " loss" in line] == [str(step) for step in range(1, 9)]
    assert lines.count("finish") == 2 and lines[-1] == "finish"

    checkpoint = Store(run).find(8).path
    assert any("lora_magnitude" in name for name in load_file(checkpoint / "adapter_model.safetensors")), "dora"
    moments = load_file(checkpoint / "optimizer.safetensors")
    assert moments and {name.rpartition(".")[2] for name in moments} == {"exp_avg"}, "lion"


@pytest.mark.slow
def test_a_key_of_another_toy_is_refused_as_one_of_ours_is(tree, toy_recipe, tmp_path) -> None:
    recipe = tmp_path / "toy.yaml"
    optimizers = ({"schedule": "cosine", "ramp": 0.5}, {"momentum": 0.5})
    for number, optimizer in enumerate(optimizers):
        toy_recipe["optimizer"] = {"name": "lion", "learning_rate": 0.01} | optimizer
        recipe.write_text(yaml.safe_dump(toy_recipe))
        done = finetune(tree, "plan", recipe)
        said = ("ramp: has no meaning for `cosine`", "momentum: has no meaning for `lion`")[number]
        assert done.returncode == 2 and f"optimizer.{said}" in done.stderr
