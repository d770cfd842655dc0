"""Who trains together, by flags, devices and what a scheduler says; what the ranks' codes are together."""

import pytest

from finetune.errors import FinetuneError
from finetune.launch import World, _code, devices_here, first_host, world_of

PET = {"PET_NNODES": "4", "PET_NPROC_PER_NODE": "8", "PET_NODE_RANK": "2", "PET_MASTER_ADDR": "job-0"}
SLURM = {
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_NNODES": "2",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "gpu[007-008]",
}
CASES = {
    "a laptop": ({}, {}, 0, (1, 1, 0, None)),
    "four GPUs": ({}, {}, 4, (4, 1, 0, None)),
    "two processes asked for": ({"processes": 2}, {}, 0, (2, 1, 0, None)),
    "fewer processes than GPUs": ({"processes": 2}, {}, 4, (2, 1, 0, None)),
    "two hosts by flags": (
        {"nodes": 2, "node": 1, "address": "one", "port": 29500},
        {},
        8,
        (8, 2, 1, "one:29500"),
    ),
    "Kubernetes": ({}, PET, 8, (8, 4, 2, "job-0:20000")),
    "Kubernetes, processes by devices": ({}, PET | {"PET_NPROC_PER_NODE": "auto"}, 2, (2, 4, 2, "job-0:20000")),
    "Slurm, a task a host": ({}, SLURM, 8, (8, 2, 1, "gpu007:20077")),
    "Slurm, one task": ({}, SLURM | {"SLURM_NTASKS": "1"}, 2, (2, 1, 0, None)),
    "Slurm, with a flag": ({"port": 4000}, SLURM, 8, (8, 2, 1, "gpu007:4000")),
}


@pytest.mark.parametrize("name", CASES)
def test_the_processes_are_those_that_flags_scheduler_and_devices_ask_for(name) -> None:
    flags, environment, devices, (processes, nodes, node, meeting) = CASES[name]
    world = world_of(flags | {"absent": None}, environment, devices)
    assert (world.processes, world.nodes, world.node) == (processes, nodes, node) and world.why
    assert world.size == processes * nodes
    assert (f"{world.address}:{world.port}" if meeting else world.port) == meeting


def test_a_rank_of_another_launcher_stays_one() -> None:
    assert world_of({}, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 8) is None
    assert isinstance(world_of({"processes": 2}, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 8), World)


REFUSED = {
    "hosts that do not know where to meet": ({"nodes": 2}, {}, "2 hosts have to know where to meet"),
    "a host too many": (
        {"nodes": 2, "node": 2, "address": "one", "port": 1},
        {},
        "2 is not one of 2 hosts, which are counted from 0",
    ),
    "several tasks a host": ({}, SLURM | {"SLURM_NTASKS": "16"}, "16 tasks on 2 hosts"),
    "a batch script without srun": (
        {},
        {key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"},
        "2 hosts, started without srun",
    ),
    "what a launcher sets, without LOCAL_RANK": ({}, {"RANK": "1", "WORLD_SIZE": "2"}, "has RANK and WORLD_SIZE alone"),
    "words for numbers": ({}, PET | {"PET_NNODES": "many"}, "a number was expected"),
    "no list of hosts": ({}, SLURM | {"SLURM_JOB_NODELIST": ""}, "names no host"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_half_of_what_several_hosts_need_is_refused(name) -> None:
    flags, environment, message = REFUSED[name]
    with pytest.raises(FinetuneError, match=message) as caught:
        world_of(flags, environment, 8)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("listed", "first"),
    [("gpu1", "gpu1"), ("gpu1,gpu2", "gpu1"), ("gpu[007-012,20],cpu1", "gpu007"), ("a[1,3]-ib,b", "a1-ib")],
)
def test_the_first_host_of_a_list_of_slurm(listed, first) -> None:
    assert first_host(listed) == first


def test_devices_are_those_that_the_driver_shows_and_the_environment_lets_through(tmp_path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert devices_here({}, tmp_path) == 3
    assert devices_here({"CUDA_VISIBLE_DEVICES": "0,2"}, tmp_path) == 2
    assert devices_here({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0


@pytest.mark.parametrize(
    ("codes", "stopped_by", "together"),
    [
        ([0, 0], None, 0),
        ([143, 143], 15, 143),
        ([0, 0], 15, 0),  # it was done already
        ([143, -15], 15, 143),
        ([143, -9], 15, 137),  # its grace was over
        ([1, -9], None, 1),
        ([-9, 1], None, 137),
        ([2], None, 2),
        ([143, 143], None, 143),
    ],
)
def test_one_code_for_all_ranks(codes, stopped_by, together) -> None:
    assert _code(codes, stopped_by) == together


def test_a_signal_that_comes_again_at_once_is_the_same_and_a_later_one_ends_at_once(monkeypatch) -> None:
    from finetune import run

    now, ended = [100.0], []
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run.os, "_exit", ended.append)
    signals = run.Signals()
    signals.is_training = True
    for at in (100.0, 100.1, 101.9):
        now[0] = at
        signals._receive(15, None)
    assert signals.received == 15 and not ended
    now[0] = 102.1
    signals._receive(2, None)
    assert ended == [130]
