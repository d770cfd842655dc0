"""Who trains together, by flags, devices and what a scheduler says; the cores that a container allows."""

import os

import pytest

from finetune.errors import FinetuneError
from finetune.hosts.world import World, cores, devices_here, first_host, prepare_allocator, refuse_half, world_of

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
    "Kubernetes, a range of one number": ({}, PET | {"PET_NNODES": "4:4"}, 8, (8, 4, 2, "job-0:20000")),
    "Kubernetes, processes by devices": ({}, PET | {"PET_NPROC_PER_NODE": "auto"}, 2, (2, 4, 2, "job-0:20000")),
    "Slurm, a task a host": ({}, SLURM, 8, (8, 2, 1, "gpu007:20077")),
    "Slurm, one task": ({}, SLURM | {"SLURM_NTASKS": "1"}, 2, (2, 1, 0, None)),
    "Slurm, overruled by one host": ({"nodes": 1}, SLURM | {"SLURM_NTASKS": "16"}, 8, (8, 1, 0, None)),
    "Slurm, overruled by all flags": (
        {"nodes": 3, "node": 2, "address": "one", "port": 29500},
        SLURM | {"SLURM_NTASKS": "16"},
        8,
        (8, 3, 2, "one:29500"),
    ),
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
    "an interactive shell of Slurm": ({}, SLURM | {"SLURM_STEP_ID": "4294967290"}, "2 hosts, started without srun"),
    "no processes": ({}, PET | {"PET_NPROC_PER_NODE": "0"}, "0 processes on 4 hosts"),
    "what a launcher sets, without LOCAL_RANK": ({}, {"RANK": "1", "WORLD_SIZE": "2"}, "has RANK and WORLD_SIZE alone"),
    "Kubernetes without a place to meet": ({}, {"PET_NNODES": "2", "PET_NODE_RANK": "1"}, "2 hosts have to know where"),
    "a host of Kubernetes too many": ({}, PET | {"PET_NODE_RANK": "4"}, "4 is not one of 4 hosts"),
    "a host of Kubernetes without a number": (
        {},
        {"PET_NNODES": "2", "PET_MASTER_ADDR": "job-0"},
        "-1 is not one of 2 hosts",
    ),
    "hosts that come and go": ({}, PET | {"PET_NNODES": "2:4"}, "2:4 hosts, as they come"),
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
    assert devices_here({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path) == 0
    assert devices_here({"CUDA_VISIBLE_DEVICES": "1,-1,0"}, tmp_path) == 1
    assert devices_here({"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b"}, tmp_path) == 1


def test_device_memory_grows_in_place_where_there_is_an_nvidia_device_and_nobody_has_said_how(tmp_path) -> None:
    def prepared(environment):
        prepare_allocator(environment, tmp_path)
        return environment

    assert prepared({}) == {}
    (tmp_path / "nvidia0").touch()
    assert prepared({}) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        assert prepared({name: "max_split_size_mb:64"}) == {name: "max_split_size_mb:64"}
    assert prepared({"CUDA_VISIBLE_DEVICES": ""}) == {"CUDA_VISIBLE_DEVICES": ""}


def test_a_training_alone_is_no_rank_whatever_else_is_set() -> None:
    refuse_half({"WORLD_SIZE": "1"})
    refuse_half({"RANK": "0", "WORLD_SIZE": "1"})
    with pytest.raises(FinetuneError, match="has WORLD_SIZE alone"):
        refuse_half({"WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "5000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ],
)
def test_cores_are_those_that_the_container_allows(files, expected, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores(tmp_path) == expected
