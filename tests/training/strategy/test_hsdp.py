"""Rows are spread within a host, so every host has the same number of processes, in the order of ranks."""

from types import SimpleNamespace

import pytest

from finetune.errors import FinetuneError
from finetune.training.facts import sharing_of
from finetune.training.strategy.hsdp import prepare


@pytest.mark.parametrize(("ranks", "rank", "local"), [(3, 2, 0), (4, 1, 0), (4, 2, 1)])
def test_hosts_with_different_numbers_of_processes_are_refused(ranks, rank, local, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    here = SimpleNamespace(num_processes=ranks, process_index=rank, local_process_index=local)
    with pytest.raises(FinetuneError, match="hosts have different numbers of processes"):
        prepare(here, None, None)


def test_the_number_of_hosts_is_a_fact_of_this_strategy_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert sharing_of("hsdp") == {"strategy": "hsdp", "hosts": 2}
    assert sharing_of("fsdp") == {"strategy": "fsdp"}
