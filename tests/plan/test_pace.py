"""What is left of a training is its tokens at the pace of the steps before, and what evaluations and saves took before."""

import pytest

from finetune.plan.pace import FORECAST_AFTER_STEPS, Pace, ahead, largest_step, tokens_of
from finetune.recipe.load import load
from finetune.store.run import journal
from finetune.training.resolve import resolve


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def paced(clock):
    def make(**left):
        pace = Pace(**{"tokens": 1000, "evaluations": 0, "saves": 0} | left)
        pace.clock, pace._mark = clock, 0.0
        return pace

    return make


def take_step(pace, tokens, seconds):
    pace.clock.now += seconds
    pace.step(tokens)


def test_steps_count_by_their_tokens_and_the_first_one_not_at_all(paced):
    pace = paced()
    take_step(pace, tokens=100, seconds=60)
    take_step(pace, tokens=100, seconds=1)
    take_step(pace, tokens=300, seconds=3)
    assert pace.seconds_per_token == pytest.approx(0.01)
    assert pace.seconds_left == pytest.approx(5)  # 500 of 1,000 tokens are left


def test_before_the_second_step_the_first_is_all_there_is(paced):
    pace = paced()
    take_step(pace, tokens=100, seconds=2)
    assert pace.seconds_left == pytest.approx(18)


def test_evaluations_and_saves_cost_what_they_cost_before_and_slow_no_step(paced, clock):
    pace = paced(evaluations=3, saves=2)
    for seconds in (7, 1):
        take_step(pace, tokens=100, seconds=seconds)
    with pace.aside("evaluation"):
        clock.now += 20
    with pace.aside("save"):
        clock.now += 5
    take_step(pace, tokens=100, seconds=1)
    assert pace.seconds_per_token == pytest.approx(0.01)
    assert pace.seconds_left == pytest.approx(7 + 2 * 20 + 1 * 5)


def test_an_evaluation_that_none_came_before_is_a_forward_of_its_tokens(paced):
    pace = paced(evaluations=2, evaluation_tokens=300)
    take_step(pace, tokens=100, seconds=1)
    assert pace.seconds_of("evaluation") == pytest.approx(1)
    assert pace.seconds_left == pytest.approx(9 + 2)


def test_a_save_that_was_not_foreseen_leaves_those_to_come(paced, clock):
    pace = paced(saves=2)
    take_step(pace, tokens=100, seconds=1)
    with pace.aside("save", is_foreseen=False):
        clock.now += 5
    assert pace.left["save"] == 2 and pace.seconds_of("save") == 5
    with pace.aside("save"):
        clock.now += 5
    assert pace.left["save"] == 1


def test_the_evaluation_before_the_first_step_is_none_of_those_to_come(paced, clock):
    pace = paced(evaluations=2)
    with pace.aside("evaluation"):
        clock.now += 4
    take_step(pace, tokens=1000, seconds=1)
    assert pace.seconds_left == pytest.approx(8)


def test_what_is_ahead_is_counted_from_the_plan(recipe_file):
    recipe = recipe_file(
        train={"steps": 20, "batch_size": 6, "precision": "fp32"},
        evaluate={"every": "8 steps"},
        checkpoint={"every": "5 steps", "keep": {"weights_every": "4 steps"}},
    )
    resolved = resolve(load(recipe))
    plan, lengths = resolved.plan, resolved.train.lengths
    assert ahead(plan, 0, 20).left == {"evaluation": 3, "save": 8}  # 8, 16, 20; 4, 5, 8, 10, 12, 15, 16, 20
    assert ahead(plan, 8, 18).left == {"evaluation": 1, "save": 5}
    expected = [int(lengths[plan.order.examples_of(step)].sum()) for step in range(1, 21)]
    assert tokens_of(plan, lengths, 3, 20) == sum(expected[3:])
    assert largest_step(plan, lengths) == max(expected)
    assert ahead(plan, 0, 7).tokens == plan.counts.tokens  # 40 rows in steps of 6 are one epoch


def test_tokens_of_very_many_steps_are_their_mean(recipe_file):
    resolved = resolve(load(recipe_file(train={"epochs": 1000, "batch_size": 6, "precision": "fp32"})))
    plan = resolved.plan
    assert tokens_of(plan, resolved.train.lengths, 7, plan.steps) == 999 * plan.counts.tokens


@pytest.mark.slow
def test_training_says_how_long_the_rest_takes_once_and_journals_it(recipe_file, train, tmp_path, capfd):
    recipe = recipe_file(
        train={"steps": FORECAST_AFTER_STEPS + 4, "batch_size": 6, "precision": "fp32"}, evaluate={"every": "10 steps"}
    )
    run = train(recipe, tmp_path / "run")
    [event] = [record for record in journal.read(run) if record.get("event") == "forecast"]
    assert event["step"] == FORECAST_AFTER_STEPS
    later = [record["tokens"] for step, record in journal.steps(journal.read(run)).items() if step > event["step"]]
    assert event["tokens_left"] == sum(later) and event["seconds_left"] > 0
    assert (event["evaluations_left"], event["saves_left"]) == (1, 1)
    assert "forecast" not in capfd.readouterr().err  # --quiet


@pytest.mark.slow
def test_the_forecast_is_on_stderr(recipe_file, tmp_path, finetune):
    steps = FORECAST_AFTER_STEPS + 1
    recipe = recipe_file(train={"steps": steps, "batch_size": 2, "precision": "fp32"}, checkpoint={"every": "30 steps"})
    result = finetune("train", recipe, "--run", tmp_path / "run")
    [line] = [line for line in result.stderr.splitlines() if line.startswith("forecast")]
    assert line.startswith(f"forecast at step {FORECAST_AFTER_STEPS}: 0:0")
    assert line.endswith(" left, 1 evaluation and 1 save included")
