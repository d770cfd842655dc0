"""Which kernels a training runs, and that no wrong one gets through. Formulas stand for the kernels here; `test_fused` has the real ones."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoConfig

from finetune.debug import as_trained
from finetune.errors import BaseError, FinetuneError, RunError
from finetune.model import base, fused
from finetune.model.fused import formulas, liger
from finetune.plan import memory
from finetune.plan.memory import Device, Work
from finetune.recipe.load import load
from finetune.store.run import journal
from finetune.training import device, fitting, kernels
from finetune.training.agreement import with_what_fits_all
from finetune.training.kernels import Kernels, chosen, compared
from finetune.training.resolve import in_kernels, resolve
from finetune.training.resume import Opened, open_plan


@pytest.fixture
def by_formula(monkeypatch):
    """As if the kernels could run here."""
    monkeypatch.setattr(liger, "norm", formulas.norm)
    monkeypatch.setattr(liger, "gated", formulas.gated)
    monkeypatch.setattr(
        liger, "rotated", lambda *states: tuple(formulas.rotated(each, *states[2:]) for each in states[:2])
    )
    monkeypatch.setattr(liger, "versions", lambda: "liger-kernel 1, triton 2")
    monkeypatch.setattr(kernels, "_device", lambda _: torch.device("cpu"))


class Halved(torch.autograd.Function):
    """The right numbers, and half of their gradient."""

    @staticmethod
    def forward(ctx, made):
        return made.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_a_trial_finds_what_can_be_fused(by_formula, family):
    found = compared(AutoConfig.for_model(family), 64, torch.device("cpu"))
    parts = kernels.as_parts(json.loads(json.dumps(found["parts"])))
    assert (found["reason"], parts.told) == (None, "norms, rotary positions, feed-forward")
    assert parts == found["parts"]


def test_a_kernel_with_a_wrong_gradient_is_not_taken(by_formula, monkeypatch):
    monkeypatch.setattr(liger, "gated", lambda *given: Halved.apply(formulas.gated(*given)))
    found = compared(AutoConfig.for_model("llama"), 64, torch.device("cpu"))
    assert found == {"parts": None, "reason": "fused kernels give another gradient of model.embed_tokens.weight"}


def test_a_kernel_that_fails_and_a_base_without_parts_are_reasons(by_formula, monkeypatch):
    found = compared(AutoConfig.for_model("gpt2"), 64, torch.device("cpu"))
    assert found["reason"] == "this base has nothing that a kernel knows"
    monkeypatch.setattr(liger, "norm", lambda *_: torch.zeros(3) + torch.zeros(4))
    with pytest.raises(BaseError, match="fused kernels fail .RuntimeError: The size of tensor a"):
        compared(AutoConfig.for_model("llama"), 64, torch.device("cpu"))


def test_a_failure_of_kernels_is_not_kept_for_the_next_start(recipe_file, tiny_base, by_formula, monkeypatch):
    def without_compiler(*_):
        raise subprocess.CalledProcessError(1, "cc")

    with monkeypatch.context() as patch:
        patch.setattr(liger, "norm", without_compiler)
        assert "CalledProcessError" in choice(recipe_file, tiny_base).why
    assert choice(recipe_file, tiny_base).parts


def choice(recipe_file, tiny_base, *changes, recorded=None, **options):
    return chosen(load(recipe_file(), changes).recipe, tiny_base, recorded, **options)


def test_a_cpu_has_plain_kernels_and_says_why(recipe_file, tiny_base):
    why = "this machine has no CUDA device"
    assert choice(recipe_file, tiny_base) == Kernels("plain", why)
    assert choice(recipe_file, tiny_base, "train.kernels=plain").told == "plain: the recipe says so"
    with pytest.raises(FinetuneError, match=f"train.kernels: `fused` kernels cannot run: {why}"):
        choice(recipe_file, tiny_base, "train.kernels=fused")
    assert choice(recipe_file, tiny_base, "train.kernels=fused", is_refused=False).why == why


def test_without_the_packages_the_extra_is_named(recipe_file, tiny_base, by_formula, monkeypatch):
    monkeypatch.setattr(liger, "versions", lambda: None)
    assert choice(recipe_file, tiny_base).told == "plain: liger-kernel and triton are not both installed"
    with pytest.raises(FinetuneError, match="not both installed\nhint: pip install 'finetune\\[kernels\\]'"):
        choice(recipe_file, tiny_base, "train.kernels=fused")


def test_auto_takes_them_where_they_run_and_keeps_those_of_a_run(recipe_file, tiny_base, by_formula):
    found = choice(recipe_file, tiny_base)
    assert (found.name, found.told) == (liger.versions(), "fused: norms, rotary positions, feed-forward")
    assert choice(recipe_file, tiny_base, recorded="plain").told == "plain: the run began so"
    assert choice(recipe_file, tiny_base, recorded="liger-kernel 0, triton 1") == found
    assert choice(recipe_file, tiny_base, "train.kernels=fused", recorded="plain") == found
    assert choice(recipe_file, tiny_base, "train.compile=true").told == "compiled: norms, feed-forward"
    compiling = ("train.compile=true", "train.reproducibility=fast")
    assert choice(recipe_file, tiny_base, *compiling).told == "plain: train.compile fuses the same parts"


def test_the_base_itself_is_tried_forward_and_backward(tiny_base, by_formula, monkeypatch):
    model = base.load_model(tiny_base)
    fitting.check_kernels(model)  # nothing to check
    fused.apply(model, fused.parts_of(model))
    fitting.check_kernels(model)
    assert fused.switch_of(model).calls == {"norms": 5, "rotary": 2, "gated": 2}
    message = "train.kernels: fused kernels do not give what this base gives\nhint: set train.kernels: plain"
    for wrong in (lambda made: 1.1 * made, Halved.apply):
        monkeypatch.setattr(liger, "norm", lambda *given, wrong=wrong: wrong(formulas.norm(*given)))
        with pytest.raises(FinetuneError, match=message):
            fitting.check_kernels(model)
    fitting.check_kernels(model, is_whole=False)  # without gradients this one shows nothing


@pytest.mark.slow
def test_a_run_records_its_kernels_and_says_where_they_change(recipe_file, tmp_path, by_formula, monkeypatch, capfd):
    recipe, run = recipe_file(train={"steps": 2, "batch_size": 4, "kernels": "auto"}), tmp_path / "run"
    from finetune.training.run import train as train_run

    train_run(load(recipe), run)
    assert "kernels are fused: norms, rotary positions, feed-forward" in capfd.readouterr().err
    assert json.loads((run / "plan.json").read_text())["facts"]["kernels"] == "liger-kernel 1, triton 2"
    monkeypatch.setattr(liger, "versions", lambda: "liger-kernel 3, triton 4")
    train_run(load(recipe, ["train.steps=3"]), run)
    told = "kernels changed: liger-kernel 1, triton 2 -> liger-kernel 3, triton 4; bit equality may be lost"
    assert told in capfd.readouterr().err
    record = json.loads((run / "plan.json").read_text())
    record["facts"]["micro_batch_tokens"] = 10**6  # which fit while fused kernels kept less
    (run / "plan.json").write_text(json.dumps(record))
    found = [
        open_plan(load(recipe, ["train.steps=3", f"train.kernels={kind}"]), run, Accelerator()).resolved
        for kind in ("auto", "plain")
    ]
    assert found[0].micro_batch_tokens == 10**6 > found[1].micro_batch_tokens


def test_a_step_runs_again_with_kernels_of_its_kind_or_not_at_all(recipe_file, tiny_base):
    compiled = load(recipe_file(), ["train.compile=true"]).recipe
    here = as_trained.kernels(SimpleNamespace(recipe=compiled), tiny_base, [{"kernels": "plain"}])
    assert here.name == as_trained.name_here({"kernels": "plain"}, here) == "compiled"
    message = "step 3: was trained with plain kernels, and the run has compiled ones since, which round otherwise"
    with pytest.raises(RunError, match=message):
        as_trained.switch(None, 3, {}, here)
    as_trained.switch(SimpleNamespace(model=base.load_model(tiny_base)), 3, {"kernels": "compiled"}, here)
    plain = as_trained.kernels(SimpleNamespace(recipe=load(recipe_file()).recipe), tiny_base, [{}])
    with pytest.raises(RunError, match="step 4: was trained with compiled kernels, and the run has plain ones since"):
        as_trained.switch(None, 4, {"kernels": "compiled"}, plain)


def test_ranks_with_other_kernels_are_refused(recipe_file):
    resolved = resolve(load(recipe_file()))
    others = torch.tensor([[0, 0, 0, 1]])  # added to the number that stands for their name
    accelerator = SimpleNamespace(num_processes=2, device="cpu", gather=lambda own: torch.cat([own, own + others]))
    message = "ranks \\[1\\] have other kernels than rank 0; this one has plain\nhint: install the same packages"
    with pytest.raises(RunError, match=message):
        with_what_fits_all(Opened(resolved, {}, []), accelerator)


FROZEN = {"name": "frozen", "freeze": ["model.embed_tokens.*", "model.layers.0.*"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "settings"),
    [
        ({"name": "lora", "rank": 4, "targets": ["gate_proj", "down_proj"]}, {"activation_checkpointing": True}),
        (FROZEN, {"mlp_chunk_tokens": 16, "activation_checkpointing": True}),
        (None, {"ema": 0.9}),
    ],
    ids=["lora, checkpointed", "frozen, in pieces", "full, averaged"],
)
def test_fused_parts_go_with_what_else_changes_a_model(recipe_file, tmp_path, by_formula, adapter, settings):
    from finetune.training.run import train as train_run

    losses = []
    for kernels_ in ("fused", "plain"):
        train = {"steps": 2, "batch_size": 4, "precision": "fp32", "kernels": kernels_, **settings}
        train_run(load(recipe_file(adapter=adapter, train=train)), tmp_path / kernels_, is_quiet=True)
        steps = journal.steps(journal.read(tmp_path / kernels_))
        losses.append([(steps[step]["loss"], steps[step]["grad_norm"]) for step in sorted(steps)])
    assert losses[0] == [pytest.approx(pair, rel=1e-4) for pair in losses[1]]


def test_auto_fills_what_fused_kernels_leave_free(recipe_file, tiny_base, by_formula, monkeypatch):
    loaded = load(recipe_file(train={"steps": 2, "batch_size": 600, "precision": "bf16"}))
    plain = resolve(loaded)
    took = chosen(loaded.recipe, tiny_base)
    tokens = 4 * plain.plan.counts.longest
    step = 600 * plain.plan.counts.longest
    needed = memory.parts(plain.plan, took.shaped(plain.shape), Work(tokens, step), Device(2**40, is_gpu=True))
    card = Device(1 + round(sum(needed.values()) / memory.MARGIN), is_gpu=True)
    monkeypatch.setattr(device, "device", lambda: card)
    assert device.shared(plain.plan, plain.shape) == ("ddp", tokens // 2)
    fused_ = in_kernels(plain, took)
    assert (fused_.strategy, fused_.micro_batch_tokens) == ("ddp", tokens)
