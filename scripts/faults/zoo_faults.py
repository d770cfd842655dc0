"""The faults of `zoo.py`: what each does to a row or to the code that trains, and what `bisect` is asked about it."""

import base64
import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from unittest.mock import patch

import torch

from finetune.data.batches import Examples
from finetune.plan.plan import Plan
from finetune.plan.row_order import Order
from finetune.training import loop, state
from finetune.training.strategy import STRATEGIES

STEPS, BATCH, ROWS = 64, 4, 300  # of each training
MARK = "\x7f"  # in no docstring; a token of its own, as every byte is
SGD = {"name": "sgd", "learning_rate": 0.02, "max_grad_norm": 1e9, "schedule": "constant", "warmup": 0}
DROPOUT = {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.2}


@dataclass(frozen=True)
class Fault:
    ask: Callable[[dict, int], dict]
    """(figures of the sound run, the step) -> what `bisect` is asked."""
    edit: Callable[[str, random.Random], str] | None = None
    """Of a row's text."""
    patch: Callable[[int], contextlib.AbstractContextManager] | None = None
    """Of the code that trains."""
    stays: bool = False
    """The patch is there when `bisect` runs as well: it is how the model is, not what happened to it."""
    names_row: bool = False
    sections: dict = field(default_factory=dict)


def above(quantity: str, factor: float = 1.05) -> Callable[[dict, int], dict]:
    """Bad is what the sound run never had."""
    return lambda figures, step: {"bad_if": f"{quantity} > {factor * figures[quantity]}"}


def explain(figures: dict, step: int) -> dict:
    """A fault that nobody saw: the last step is to be explained."""
    return {"bad": STEPS}


def held_out(figures: dict, step: int) -> dict:
    return {"bad_evaluation": f"loss > {1.05 * figures['start']}"}


@contextlib.contextmanager
def patched(owner: object, name: str, value: object) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def before_step(change: Callable[[state.TrainState, int], None], lasts: bool = False) -> Callable[[int], object]:
    """`change(state, step)` before step k, or before it and all that follow."""

    def patch(at: int) -> contextlib.AbstractContextManager:
        sound = loop.train_step

        def train_step(live: state.TrainState, *arguments: object) -> loop.StepReport:
            if live.step + 1 == at or (lasts and live.step + 1 > at):
                change(live, live.step + 1)
            return sound(live, *arguments)

        return patched(loop, "train_step", train_step)

    return patch


def flip_bit(live: state.TrainState, step: int) -> None:
    weight = live.trainable["model.layers.1.mlp.down_proj.weight"]
    with torch.no_grad():
        weight.view(torch.int32)[3, 5] ^= 1 << 30  # the first one of the exponent


def explode(live: state.TrainState, step: int) -> None:
    with torch.no_grad():
        live.trainable["model.layers.0.mlp.up_proj.weight"].mul_(30)


def nudge(live: state.TrainState, step: int) -> None:
    with torch.no_grad():
        live.trainable["model.layers.1.self_attn.v_proj.weight"][0, 0] += 1e-4


def frozen(at: int) -> contextlib.AbstractContextManager:
    sound = STRATEGIES["ddp"].gradient_norms

    def norms(live: state.TrainState) -> torch.Tensor:
        if live.step + 1 >= at:
            for name, parameter in live.trainable.items():
                if ".layers.1." in name:
                    parameter.grad.zero_()
        return sound(live)

    return patch.dict(STRATEGIES, {"ddp": replace(STRATEGIES["ddp"], gradient_norms=norms)})


def in_bf16(at: int) -> contextlib.AbstractContextManager:
    sound = loop.train_step

    def train_step(live: state.TrainState, *arguments: object) -> loop.StepReport:
        with torch.autocast("cpu", torch.bfloat16, enabled=live.step + 1 >= at):
            return sound(live, *arguments)

    return patched(loop, "train_step", train_step)


def scaled_loss(at: int) -> contextlib.AbstractContextManager:
    """Counted twice, as when accumulation is normalised twice."""
    sound = STRATEGIES["ddp"].gradient_norms

    def norms(live: state.TrainState) -> torch.Tensor:
        if live.step + 1 >= at:
            for parameter in live.trainable.values():
                parameter.grad.mul_(2)
        return sound(live)

    return patch.dict(STRATEGIES, {"ddp": replace(STRATEGIES["ddp"], gradient_norms=norms)})


def reused_seed(at: int) -> contextlib.AbstractContextManager:
    sound = loop.derive
    return patched(loop, "derive", lambda seed, step, slot: sound(seed, min(step, at - 1), slot))


def learning_rate(factor: float, lasts: bool = False) -> Callable[[int], object]:
    sound = Plan.learning_rate

    def patch(at: int) -> contextlib.AbstractContextManager:
        def wrong(plan: Plan, step: int) -> float:
            return sound(plan, step) * (factor if step == at or (lasts and step > at) else 1)

        return patched(Plan, "learning_rate", wrong)

    return patch


def other_examples(change: Callable) -> Callable[[int], object]:
    """`change(ids)` is what a step and those after it train on."""

    def patch(at: int) -> contextlib.AbstractContextManager:
        sound = Plan.examples_of
        return patched(
            Plan, "examples_of", lambda plan, step: sound(plan, step) if step < at else change(plan, step, sound)
        )

    return patch


def other_tokens(change: Callable) -> Callable[[int], object]:
    """From a step on, `change(example, id)` is what is read."""

    @contextlib.contextmanager
    def patch(at: int) -> Iterator[None]:
        sound, now = Examples.__getitem__, {"step": 0}

        def watch(live: state.TrainState, step: int) -> None:
            now["step"] = step

        def read(examples: Examples, example: int) -> object:
            found = sound(examples, example)
            return change(found, example, at) if now["step"] >= at else found

        with before_step(watch, lasts=True)(1), patched(Examples, "__getitem__", read):
            yield

    return patch


def other_vocabulary(found: object, example: int, at: int) -> object:
    swapped = found.tokens.copy()
    swapped[found.tokens == 70], swapped[found.tokens == 85] = 85, 70
    return found._replace(tokens=swapped)


def other_template(found: object, example: int, at: int) -> object:
    """Another beginning of every row."""
    changed = found.tokens.copy()
    changed[:2] = changed[0]
    return found._replace(tokens=changed)


def one_edited(found: object, example: int, at: int) -> object:
    return found._replace(tokens=found.tokens[::-1].copy()) if example == edited(at) else found


def edited(step: int) -> int:
    return int(Order(0, BATCH, (ROWS,)).examples_of(step)[1])


def not_finite(at: int) -> contextlib.AbstractContextManager:
    """The model overflows on one character."""
    return intolerant(float("nan"))


def wrecking(at: int) -> contextlib.AbstractContextManager:
    return intolerant(3_000.0)


def intolerant(value: float) -> contextlib.AbstractContextManager:
    sound = state.Objective.forward

    def forward(self: state.Objective, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        total, rows = sound(self, batch)
        inputs = batch["model_inputs"]
        bounds, tokens = inputs["row_bounds"], inputs["input_ids"].flatten()
        has = [bool((tokens[a:b] == mark_token()).any()) for a, b in zip(bounds, bounds[1:], strict=False)]
        factors = torch.where(torch.tensor(has), value, 1.0).to(rows)
        return total * (rows * factors).sum() / rows.sum(), rows * factors

    return patched(state.Objective, "forward", forward)


@cache
def mark_token() -> int:
    from tokenizers.pre_tokenizers import ByteLevel

    letter = ByteLevel(add_prefix_space=False).pre_tokenize_str(MARK)[0][0]
    return 1 + sorted(ByteLevel.alphabet()).index(letter)  # as `tiny_base` numbers them


def noise(text: str, draw: random.Random) -> str:
    return "".join(chr(draw.randrange(33, 127)) for _ in text)


FAULTS = {
    "random characters": Fault(above("row_loss"), edit=noise, names_row=True),
    "base64": Fault(
        above("row_loss"), edit=lambda text, draw: base64.b64encode(draw.randbytes(60)).decode(), names_row=True
    ),
    "another script": Fault(
        above("row_loss"),
        edit=lambda text, draw: "".join(chr(draw.randrange(0x4E00, 0x9F00)) for _ in range(20)),
        names_row=True,
    ),
    "labels of another row": Fault(above("row_loss"), edit=lambda text, draw: text[::-1].swapcase(), names_row=True),
    "repeated n-gram": Fault(above("row_loss"), edit=lambda text, draw: "xqz " * 20, names_row=True),
    "one huge row": Fault(
        above("tokens"),
        edit=lambda text, draw: (text + " ") * 9,
        names_row=True,
        sections={"task": {"name": "text", "max_length": 512}},
    ),
    "a row of digits": Fault(
        above("row_loss"), edit=lambda text, draw: "".join(draw.choices("0123456789", k=70)), names_row=True
    ),
    "a row that is no number": Fault(
        lambda figures, step: {"bad_if": "loss > 100"},
        edit=lambda text, draw: text + MARK,
        patch=not_finite,
        stays=True,
        names_row=True,
    ),
    "a row that wrecks the weights": Fault(
        held_out,
        edit=lambda text, draw: text + MARK,
        patch=wrecking,
        stays=True,
        names_row=True,
        sections={"optimizer": SGD},
    ),
    "a row that wrecks, seen in the loss": Fault(
        lambda figures, step: {"bad_if": f"loss > {1.5 * figures['loss']}", "good": step},
        edit=lambda text, draw: text + MARK,
        patch=wrecking,
        stays=True,
        names_row=True,
        sections={"optimizer": SGD},
    ),
    "learning rate of one step": Fault(explain, patch=learning_rate(100)),
    "learning rate from a step on": Fault(
        held_out, patch=learning_rate(300, lasts=True), sections={"optimizer": SGD | {"learning_rate": 0.005}}
    ),
    "weight bit flip": Fault(lambda figures, step: {"bad_if": "loss > 100"}, patch=before_step(flip_bit)),
    "exploding layer": Fault(held_out, patch=before_step(explode)),
    "wrong dtype from a step on": Fault(explain, patch=in_bf16),
    "frozen layer from a step on": Fault(lambda figures, step: {"bad_if": "grad_norm/layers.1 < 1e-9"}, patch=frozen),
    "weights that drift by themselves": Fault(explain, patch=before_step(nudge, lasts=True)),
    "reused seed": Fault(explain, patch=reused_seed, sections={"adapter": DROPOUT}),
    "loss counted twice": Fault(explain, patch=scaled_loss),
    "tokenizer change": Fault(explain, patch=other_tokens(other_vocabulary)),
    "template change": Fault(explain, patch=other_tokens(other_template)),
    "data file edited in mid-run": Fault(above("row_loss"), patch=other_tokens(one_edited), names_row=True),
    "batch size from a step on": Fault(explain, patch=other_examples(lambda plan, step, sound: sound(plan, step)[:-1])),
    "order from a step on": Fault(explain, patch=other_examples(lambda plan, step, sound: sound(plan, step + 1))),
}
