"""Which processes train together: by flags, the variables of a launcher or scheduler, else the devices here; and their cores."""

import itertools
import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, cast

from finetune.errors import FinetuneError

PORTS = range(20_000, 30_000)
NO_STEP = 0xFFFFFFFA  # the least of Slurm's numbers for what srun has not started: an interactive shell, a batch script
TOLD = "FINETUNE_TOLD"
"""The descriptor of the pipe for a rank's error code, if it did not crash. A pipe, because a disk may be full."""
OF_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@dataclass(frozen=True)
class World:
    """The processes of a training: `processes` on each of `nodes` hosts, this is number `node`, and they meet at `address`."""

    processes: int
    why: str
    nodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int | None = None
    """The port of rank 0; None on one host: it takes a free one."""

    @property
    def size(self) -> int:
        return self.nodes * self.processes


class Flags(TypedDict, total=False):
    """The flags of `launch`; None for one you do not give."""

    processes: int | None
    nodes: int | None
    node: int | None
    address: str | None
    port: int | None


def world_of(asked: Flags, environment: Mapping[str, str], devices: int) -> World | None:
    """Which processes train together: by the flags, else by the scheduler, else one for each device. None if this process is already
    a launcher's rank.

    FinetuneError if the flags or the environment have only half of what several hosts need.
    """
    flags = {key: value for key, value in asked.items() if value is not None}
    if not flags and all(name in environment for name in OF_LAUNCHER):
        return None
    is_all_said = flags.get("nodes") == 1 or {"nodes", "node", "address", "port"} <= flags.keys()
    found = None if is_all_said else _of_scheduler(environment, devices)
    if not found and not flags:
        refuse_half(environment)
    here = "no NVIDIA GPU here" if not devices else "one GPU here" if devices == 1 else f"{devices} GPUs here"
    world = found or World(max(devices, 1), here)
    if flags:
        world = replace(world, **cast(dict[str, Any], flags), why="as the flags say")
    if world.nodes > 1 and (world.port is None or world.address == "127.0.0.1"):
        hint = "give --master-addr and --master-port, the same on all hosts, and --node-rank"
        raise FinetuneError(f"{world.nodes} hosts have to know where to meet", where="--nnodes", hint=hint)
    if min(world.processes, world.nodes) < 1:
        message = f"{world.processes} processes on {world.nodes} hosts train nothing"
        raise FinetuneError(message, where="environment", hint="correct what the scheduler sets, or give the flags")
    if not 0 <= world.node < world.nodes:
        message = f"{world.node} is not one of {world.nodes} hosts, which are counted from 0"
        raise FinetuneError(message, where="--node-rank", hint="give each host another one")
    return world


def refuse_half(environment: Mapping[str, str]) -> None:
    """FinetuneError if a launcher's variables do not tell which of its processes this is."""
    found = [name for name in OF_LAUNCHER if name in environment]
    if 0 < len(found) < len(OF_LAUNCHER) and environment.get("WORLD_SIZE") != "1":
        hint = "a launcher sets RANK, LOCAL_RANK and WORLD_SIZE: unset them, or use `finetune launch` and its flags"
        raise FinetuneError(f"has {' and '.join(found)} alone", where="environment", hint=hint)


def _of_scheduler(environment: Mapping[str, str], devices: int) -> World | None:
    """Several hosts or tasks, by Kubernetes' training operator (PET_…) or Slurm."""
    try:
        if "PET_NNODES" in environment:
            each = environment.get("PET_NPROC_PER_NODE", "auto")
            nodes = _of_range(environment["PET_NNODES"])
            unsaid = "0" if nodes == 1 else "-1"
            return World(
                processes=int(each) if each.isdecimal() else max(devices, 1),
                why="Kubernetes' PET_NNODES",
                nodes=nodes,
                node=int(environment.get("PET_NODE_RANK", environment.get("RANK", unsaid))),
                address=environment.get("PET_MASTER_ADDR", environment.get("MASTER_ADDR", "127.0.0.1")),
                port=int(environment.get("PET_MASTER_PORT", environment.get("MASTER_PORT", PORTS[0]))),
            )
        if "SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
            tasks, nodes = int(environment["SLURM_NTASKS"]), int(environment.get("SLURM_NNODES", "1"))
            if tasks > nodes:
                hint = "ask Slurm for one task a host (--ntasks-per-node=1): its GPUs get a process each"
                raise FinetuneError(f"{tasks} tasks on {nodes} hosts", where="SLURM_NTASKS", hint=hint)
            if int(environment.get("SLURM_STEP_ID", NO_STEP)) >= NO_STEP:  # nothing starts the tasks beside this one
                message = f"{nodes} hosts, started without srun"
                raise FinetuneError(message, where="SLURM_NNODES", hint="put `srun` before it: srun finetune launch …")
            listed = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
            return World(
                processes=max(devices, 1),
                why="Slurm's SLURM_NNODES",
                nodes=nodes,
                node=int(environment["SLURM_PROCID"]),
                address=first_host(listed),
                port=PORTS[int(environment.get("SLURM_JOB_ID", "0")) % len(PORTS)],
            )
    except ValueError as error:
        hint = "correct what the scheduler sets, or give the flags"
        raise FinetuneError(f"a number was expected: {error}", where="environment", hint=hint) from None
    return None


def _of_range(hosts: str) -> int:
    """Reads Kubernetes' `2` or `2:2`."""
    fewest, _, most = hosts.partition(":")
    if most not in ("", fewest):
        hint = "ask for a fixed number: a run has the same processes all the time"
        raise FinetuneError(f"{hosts} hosts, as they come", where="PET_NNODES", hint=hint)
    return int(fewest)


def first_host(listed: str) -> str:
    """The first of Slurm's list of hosts, like `gpu[007-012,20],cpu1`."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", listed)
    if not match:
        raise FinetuneError("names no host", where="SLURM_JOB_NODELIST", hint="give --master-addr")
    return "".join(part or "" for part in match.groups())


def devices_here(environment: Mapping[str, str], place: Path = Path("/dev")) -> int:
    """The number of NVIDIA devices by the driver, or by CUDA_VISIBLE_DEVICES; without importing torch."""
    found = len([path for path in place.glob("nvidia*") if path.name[6:].isdecimal()])
    if "CUDA_VISIBLE_DEVICES" not in environment:
        return found
    named = [name.strip() for name in environment["CUDA_VISIBLE_DEVICES"].split(",")]
    visible = list(itertools.takewhile(lambda name: name and not name.startswith("-"), named))  # CUDA ends there
    has_parts = any(name.startswith("MIG-") for name in visible)  # a process sees one part of a device
    return min(found, 1 if has_parts else len(visible))


def prepare_allocator(environment: MutableMapping[str, str], place: Path = Path("/dev")) -> None:
    """Lets torch's blocks of device memory grow in place, unless the user set the variable. Packed micro-batches differ in length, and
    every new length would leave a hole. Bits do not change. torch reads the variable once, on import."""
    if devices_here(environment, place) and "PYTORCH_CUDA_ALLOC_CONF" not in environment:
        environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def cores(quotas: Path = Path("/sys/fs/cgroup")) -> int:
    """The cores this process may use: by its affinity, and by the quota of its container (cgroups of either version)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    words = _words(quotas / "cpu.max") or [
        *_words(quotas / "cpu/cpu.cfs_quota_us"),
        *_words(quotas / "cpu/cpu.cfs_period_us"),
    ]
    if len(words) == 2 and all(word.isdecimal() for word in words):  # `max` and -1 are none
        quota, period = map(int, words)
        allowed = min(allowed, max(1, -(-quota // period)))
    return allowed


def _words(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []
