"""A step is what plain torch does with the same rows, however they are arranged; and a step that cannot be right does not happen."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from finetune.data.batches import Batches
from finetune.model import base
from finetune.recipe.load import load
from finetune.training import evaluation, loop
from finetune.training.build import build
from finetune.training.evaluation import batches as batches_of
from finetune.training.evaluation import evaluate
from finetune.training.resolve import resolve
from finetune.training.strategy.start import start_accelerator

FULL = {"adapter": None, "optimizer": {"learning_rate": 0.01, "weight_decay": 0.1, "max_grad_norm": 1.5}}
PACKED, PADDED = ({"task": {"name": "chat", "max_length": 64, "packing": is_packed}} for is_packed in (True, False))


def train_settings(**settings):
    return {"train": {"steps": 10, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128} | settings}


class Opened:
    """A run without its directory: the state at step 0 and all that moves it."""

    def __init__(self, path):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
        loaded = load(path)
        self.resolved = resolve(loaded)
        self.plan = self.resolved.plan
        self.base = base.directory(self.plan.recipe.base, self.plan.base, as_trained=True)
        self.state = build(self.plan, self.base, start_accelerator(loaded.recipe.train))
        self.batches = batches_of(self.resolved, self.resolved.train, self.state.accelerator)
        self.gradients = []
        """The gradients that each update used, clipped."""
        self.state.optimizer.optimizer.register_step_pre_hook(self._record)

    def _record(self, *_):
        self.gradients.append({name: parameter.grad.clone() for name, parameter in self.state.trainable.items()})

    def step(self):
        return loop.train_step(self.state, self.plan, self.batches)

    def weights(self):
        return {name: parameter.detach().clone() for name, parameter in self.state.trainable.items()}

    def moments(self):
        moments = [self.state.optimizer.state[parameter] for parameter in self.state.trainable.values()]
        return [{name: value.clone() for name, value in each.items()} for each in moments]


@pytest.fixture
def opened(recipe_file):
    def opened(**sections):
        return Opened(recipe_file(**sections))

    return opened


def assert_equal(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def assert_same_report(first, second):
    for field in ("step", "loss", "grad_norm", "learning_rate", "row_losses", "row_tokens"):
        assert getattr(first, field) == getattr(second, field)
    assert first.rows.tolist() == second.rows.tolist()


def row_loss(model, example):
    """Summed loss of a row, and its supervised tokens, by transformers' own `labels`."""
    tokens = torch.from_numpy(example.tokens.astype(np.int64))[None]
    labels = tokens.masked_fill(~torch.from_numpy(np.array(example.supervised))[None], -100)
    count = int(example.supervised[1:].sum())
    return model(input_ids=tokens, labels=labels).loss * count, count


@pytest.mark.parametrize("arrangement", [PACKED, PADDED])
def test_three_steps_are_those_of_plain_torch_on_the_same_rows(opened, arrangement):
    run = opened(**FULL, **arrangement)
    settings = run.plan.recipe.optimizer
    model = base.load_model(run.base).train()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        betas=settings.betas,
        eps=settings.eps,
    )
    for step in range(1, 4):
        report = run.step()
        losses, counts = zip(
            *(row_loss(model, run.resolved.train[int(example)]) for example in report.examples), strict=True
        )
        mean = torch.stack(losses).sum() / sum(counts)
        optimizer.zero_grad()
        mean.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.5)
        for group in optimizer.param_groups:
            group["lr"] = run.plan.learning_rate(step)
        optimizer.step()
        assert report.loss == pytest.approx(mean.item(), rel=1e-5)
        assert report.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        assert report.row_tokens == list(counts)
        means = [loss.item() / count for loss, count in zip(losses, counts, strict=True)]
        assert report.row_losses == pytest.approx(means, rel=1e-4)
        assert (report.step, report.learning_rate) == (step, run.plan.learning_rate(step))
        # Adam divides by the gradient's own size: where it is nearly zero, its rounding is what moves the weight
        torch.testing.assert_close(run.weights(), dict(model.named_parameters()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("arrangement", [PACKED, PADDED])
def test_micro_batches_equal_one_batch(opened, arrangement):
    whole = opened(**FULL, **arrangement, **train_settings(micro_batch_tokens=4096))
    parts = opened(**FULL, **arrangement, **train_settings(micro_batch_tokens=64))
    ids = whole.plan.order.examples_of(1)
    assert len(whole.batches.of(ids)) == 1 and len(parts.batches.of(ids)) > 2
    reports = whole.step(), parts.step()
    assert reports[0].rows.tolist() == reports[1].rows.tolist()
    assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-6)
    assert reports[0].grad_norm == pytest.approx(reports[1].grad_norm, rel=1e-5)
    torch.testing.assert_close(whole.gradients[0], parts.gradients[0], rtol=1e-4, atol=1e-6)


def test_packing_changes_neither_the_loss_nor_the_gradients_of_a_step(opened):
    packed, padded = opened(**FULL, **PACKED), opened(**FULL, **PADDED)
    reports = packed.step(), padded.step()
    assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-6)
    assert reports[0].row_losses == pytest.approx(reports[1].row_losses, rel=1e-5)
    torch.testing.assert_close(packed.gradients[0], padded.gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 9])
def test_the_shares_of_the_ranks_add_up_to_the_step_and_an_idle_rank_adds_nothing(opened, world_size):
    """A rank's share is what it would do alone; the launcher's reduction, which tests with processes cover, is left out."""
    optimizer = {"learning_rate": 0.01, "max_grad_norm": 1e9}
    settings = {"adapter": None, "optimizer": optimizer, **train_settings(micro_batch_tokens=64)}
    whole = opened(**settings)
    expected = whole.step()
    shares = []
    for rank in range(world_size):
        run = opened(**settings)
        alone = run.batches
        run.batches = Batches(alone.examples, alone.arrange, alone.collate, alone.budget, rank, world_size)
        shares.append((run.step().loss, run.gradients[0]))
    assert sum(loss for loss, _ in shares) == pytest.approx(expected.loss, rel=1e-6)
    summed = {name: sum(gradients[name] for _, gradients in shares) for name in whole.gradients[0]}
    torch.testing.assert_close(summed, whole.gradients[0], rtol=1e-4, atol=1e-6)
    if world_size == 9:
        assert shares[8][0] == 0 and not any(gradient.any() for gradient in shares[8][1].values())


def test_the_losses_of_the_rows_add_up_to_that_of_the_step(opened):
    run = opened()
    for _ in range(3):
        report = run.step()
        total = math.fsum(loss * count for loss, count in zip(report.row_losses, report.row_tokens, strict=True))
        assert total / report.supervised_tokens == pytest.approx(report.loss, rel=1e-12)
        assert sum(report.row_tokens) == report.supervised_tokens < report.tokens
        assert report.rows.tolist() == run.resolved.train.rows[report.examples].tolist()


@pytest.mark.parametrize("arrangement", [PACKED, PADDED])
def test_two_runs_of_one_recipe_are_equal_to_the_bit(opened, arrangement):
    first, second = opened(**arrangement), opened(**arrangement)
    for _ in range(3):
        assert_same_report(first.step(), second.step())
    assert_equal(first.weights(), second.weights())
    assert_equal(first.moments(), second.moments())


def test_a_step_is_the_same_again_from_the_same_state(opened):
    run = opened()
    for _ in range(2):
        run.step()
    weights, moments = run.weights(), run.moments()
    first = run.step(), run.weights(), run.moments()
    torch.rand(7)  # whatever else draws random numbers leaves no trace
    with torch.no_grad():
        for parameter, name, kept in zip(run.state.trainable.values(), weights, moments, strict=True):
            parameter.copy_(weights[name])
            run.state.optimizer.state[parameter].update(kept)
    run.state.step = 2
    second = run.step(), run.weights(), run.moments()
    assert_same_report(first[0], second[0])
    assert_equal(first[1:], second[1:])


@pytest.mark.slow
@pytest.mark.parametrize(("dropout", "count"), [(0.0, 1), (0.5, 3)])
def test_every_step_drops_out_anew(opened, dropout, count):
    """All rows in every step, at a learning rate of almost zero: only dropout can tell the steps apart."""
    adapter = {"name": "lora", "rank": 4, "dropout": dropout}
    run = opened(adapter=adapter, optimizer={"learning_rate": 1e-30}, **train_settings(batch_size=40))
    with torch.no_grad():
        for name, parameter in run.state.trainable.items():
            if "lora_B" in name:
                parameter.fill_(0.1)
    assert len({f"{run.step().loss:.3f}" for _ in range(3)}) == count


@pytest.mark.parametrize("arrangement", [PACKED, PADDED])
def test_an_evaluation_leaves_no_trace_in_training(opened, arrangement):
    plain, evaluated = opened(**arrangement), opened(**arrangement)
    for _ in range(3):
        figures = [
            evaluate(evaluated.resolved, evaluated.state.accelerator, evaluated.state.objective) for _ in range(2)
        ]
        assert figures[0] == figures[1]
        assert_same_report(plain.step(), evaluated.step())
        assert evaluated.state.objective.training
    assert_equal(plain.weights(), evaluated.weights())
    assert_equal(plain.moments(), evaluated.moments())


def test_the_held_out_loss_is_the_mean_of_a_supervised_token_without_dropout(opened):
    run = opened(**PACKED)
    figures = evaluate(run.resolved, run.state.accelerator, run.state.objective)
    model = base.load_model(run.base)  # the adapter changes nothing yet
    holdout = run.resolved.holdout
    with torch.no_grad():
        losses, counts = zip(*(row_loss(model, holdout[index]) for index in range(len(holdout))), strict=True)
    assert figures["loss"] == pytest.approx(sum(loss.item() for loss in losses) / sum(counts), rel=1e-5)
    assert (figures["rows"], figures["tokens"]) == (8, sum(counts))
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))


def test_an_evaluation_of_many_parts_is_that_of_one_and_stops_when_asked(opened, monkeypatch):
    run = opened()
    whole = evaluate(run.resolved, run.state.accelerator, run.state.objective)
    monkeypatch.setattr(evaluation, "EVALUATED_AT_ONCE", 3)
    parts = evaluate(run.resolved, run.state.accelerator, run.state.objective)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    for at_once in (3, 64):  # also within a part: a CPU may take minutes for one
        monkeypatch.setattr(evaluation, "EVALUATED_AT_ONCE", at_once)
        wishes = iter([loop.Wishes(), loop.Wishes(stop=True)])
        assert evaluate(run.resolved, run.state.accelerator, run.state.objective, partial(next, wishes)) is None
        assert run.state.objective.training


def spoil(run, spoiled):
    """From now on the losses of every micro-batch's rows go through `spoiled(rows, model)`; returns the sound loss."""
    whole = run.state.objective._loss

    def loss(model, batch, token_losses):
        total, rows = whole(model, batch, token_losses)
        changed = spoiled(rows, model)
        return total + (changed - rows).sum(), changed

    run.state.objective._loss = loss
    return whole


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_moves_nothing_and_shows_its_row(opened, value):
    run, untouched = (opened(**PACKED, **train_settings(micro_batch_tokens=4096)) for _ in range(2))
    run.step(), untouched.step()
    weights, moments = run.weights(), run.moments()
    whole = spoil(run, lambda rows, _: torch.where(torch.arange(len(rows)) == 2, value, rows))
    ids = run.plan.order.examples_of(2)
    row = run.resolved.train.rows[ids[run.batches.of(ids)[0].indices[2]]]
    report = run.step()
    assert (report.verdict.action, report.verdict.reason, report.is_finished) == ("stop", "not_finite", False)
    assert [found for found, loss in zip(report.rows, report.row_losses, strict=True) if not math.isfinite(loss)] == [
        row
    ]
    assert all(math.isfinite(norm) for norm in report.module_norms.values()) == math.isfinite(report.grad_norm)
    assert run.state.step == 1
    assert_equal(run.weights(), weights)
    assert_equal(run.moments(), moments)
    run.state.objective._loss = whole
    assert_same_report(run.step(), untouched.step())
    assert_equal(run.weights(), untouched.weights())


def test_a_gradient_that_is_not_finite_moves_nothing(opened):
    run = opened()
    weights = run.weights()
    spoil(run, lambda rows, model: rows + torch.sqrt(0 * next(p for p in model.parameters() if p.requires_grad).sum()))
    report = run.step()
    assert report.verdict.quantity == "grad_norm" and math.isfinite(report.loss)
    assert run.state.step == 0
    assert_equal(run.weights(), weights)
    assert not run.moments()[0]


def test_the_generator_yields_one_report_an_update_and_stops_where_it_is_told(opened):
    run = opened()
    asked = []

    def wishes():
        asked.append(run.state.step)
        return loop.Wishes(stop=run.state.step == 3, save=run.state.step == 1)

    reports = list(loop.steps(run.state, run.plan, run.batches, 2, wishes))
    assert [(report.step, report.agreed.save) for report in reports] == [(1, False), (2, True)]
    assert [report.step for report in loop.steps(run.state, run.plan, run.batches, 10, wishes)] == [3]
    assert asked == [0, 1, 2, 3]
    assert list(loop.steps(run.state, run.plan, run.batches, 3, wishes)) == []


def test_frozen_parameters_do_not_move(opened):
    run = opened(
        adapter={"name": "frozen", "freeze": ["model.embed_tokens.*"]},
        optimizer={"learning_rate": 0.01, "weight_decay": 0.5},
    )
    before = {name: parameter.detach().clone() for name, parameter in run.state.model.named_parameters()}
    run.step()
    moved = {name for name, parameter in run.state.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == before.keys() - {"model.embed_tokens.weight"}
