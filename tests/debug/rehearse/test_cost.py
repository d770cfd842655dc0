"""What a checkpoint costs, from records of journals, and the cadence that follows."""

import pytest

from finetune.debug.rehearse.cost import Cost, measure
from finetune.recipe.schema import Every

FACTS = {"device": "cpu x86_64", "world_size": 1, "threads": 10**6}


def step(number: int, seconds: float, attempt: str = "a") -> dict:
    return {"kind": "step", "step": number, "seconds": seconds, "attempt": attempt}


def committed(number: int, blocked_ms: float, save_seconds: float, cpu_seconds: float, attempt: str = "a") -> dict:
    figures = {"blocked_ms": blocked_ms, "wait_seconds": 0.0}
    figures |= {"save_seconds": save_seconds, "save_cpu_seconds": cpu_seconds}
    return {"kind": "event", "event": "committed", "step": number, "attempt": attempt, **figures}


def cost(**changes: object) -> Cost:
    return Cost(**{"step_seconds": 1.0, "blocked_seconds": 0.005, "save_seconds": 0.5, "cpu_seconds": 0.3} | changes)


def test_what_is_first_in_a_process_is_not_measured() -> None:
    saving = [step(1, 9.0), committed(1, 900, 9, 9), step(2, 5.0), committed(2, 4, 0.2, 0.1), step(3, 5.0)]
    resumed = [step(4, 9.0, "b"), step(5, 2.0, "b"), step(6, 3.0, "b"), committed(6, 700, 0.4, 0.3, "b")]
    found = measure([[*saving, *resumed]], FACTS)
    assert found == cost(
        step_seconds=2.5, blocked_seconds=0.004, save_seconds=0.2, cpu_seconds=0.1, has_free_core=False
    )


def test_the_wait_for_a_save_that_no_step_came_after_is_not_a_cost_of_training() -> None:
    records = [step(1, 9.0), committed(1, 900, 9, 9), step(2, 1.0), committed(2, 4, 0.2, 0.1), step(3, 1.0)]
    found = measure([[*records, step(4, 1.0), committed(4, 700, 0.4, 0.3)]], FACTS)
    assert (found.blocked_seconds, found.save_seconds) == (0.004, pytest.approx(0.3))


def test_a_save_that_waited_for_the_one_before_it_came_too_soon_and_costs_no_more() -> None:
    records = [step(1, 9.0), committed(1, 9, 9, 9), step(2, 1.0), committed(2, 4, 0.2, 0.1), step(3, 1.0), step(4, 1.0)]
    records[3] |= {"blocked_ms": 2004, "wait_seconds": 2.0}
    assert measure([records], FACTS).blocked_seconds == pytest.approx(0.004)


def test_a_process_that_ended_before_its_first_step_has_nothing_to_measure() -> None:
    evaluated = {"kind": "event", "event": "evaluated", "step": 0, "attempt": "z"}
    records = [step(1, 9.0), step(2, 1.0), committed(2, 9, 9, 9), step(3, 1.0), committed(3, 4, 0.2, 0.1), step(4, 2.0)]
    assert measure([[evaluated, *records]], FACTS).step_seconds == 1.0


def test_a_gpu_leaves_cores_to_the_writer() -> None:
    records = [step(1, 9.0), step(2, 1.0), committed(2, 9, 9, 9), step(3, 1.0), committed(3, 4, 0.2, 0.1), step(4, 2.0)]
    assert not measure([records], FACTS).has_free_core
    assert measure([records], FACTS | {"device": "NVIDIA H100", "world_size": 0}).has_free_core


def test_on_a_free_core_only_the_wait_counts() -> None:
    assert cost(has_free_core=True).smallest_interval() == 1
    assert cost(has_free_core=False).smallest_interval() == 31


def test_saves_do_not_come_faster_than_the_disk_takes_them() -> None:
    assert cost(has_free_core=True, save_seconds=7.5).smallest_interval() == 8


def test_the_shortest_cadence_decides_the_share() -> None:
    found = cost(has_free_core=False)
    assert found.share([Every(steps=100), Every(minutes=1)]) == pytest.approx(0.305 / 60)
    assert found.share([Every(minutes=0.001)]) == pytest.approx(0.305)  # at every step, not more often
