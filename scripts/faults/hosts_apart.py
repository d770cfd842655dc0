"""Cuts one of two hosts off in the middle of a training, and lets both go on: by the same commands again, or by their launchers.

    python scripts/faults/hosts_apart.py --cuts 6 --strategies ddp,fsdp --work /tmp/apart

The hosts are network namespaces (`network.py`) with one rank each; they share the run's directory, as over a shared disk. After a cut
both must end within `train.lost_rank_seconds` and ten seconds more, and name the rank that they lost. Every third cut comes inside a save, and every second one is healed before
the launchers give up, which then go on by themselves (`--restarts`). Exits 1 unless both runs end with equal bytes and equal records.
"""

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from network import CABLE, CannotConnect, Host, two_hosts
from sigkill import last_step
from training import add_arguments, command, differences, is_saving, recipe_of, unsound, wait_until

PORT, KEEP = 29_417, 3
STEPS_BETWEEN = 10  # cuts
LAST_STEPS = 40  # after the last one: cutting takes a moment, and a step a few milliseconds
SILENCE_SECONDS, MORE_SECONDS = 3, 10
UNTIL_SECONDS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--cuts", type=int, default=6, help="in each training")
    parser.add_argument("--strategies", default="ddp,fsdp")
    options = parser.parse_args()
    recipe, problems = recipe_of(options), []
    try:
        with two_hosts() as hosts:
            for strategy in options.strategies.split(","):
                problems += [f"{strategy}: {each}" for each in cut(recipe, strategy, hosts, options)]
    except CannotConnect as error:
        raise SystemExit(f"cannot make network namespaces: {error}") from error
    count = options.cuts * len(options.strategies.split(","))
    print("\n".join(problems))
    print(f"{'FAIL' if problems else 'PASS'}: {count} cuts, {len(problems)} problems")
    sys.exit(1 if problems else 0)


class Both:
    """The launchers of a training, one on each host."""

    def __init__(
        self,
        recipe: Path,
        run: Path,
        strategy: str,
        hosts: tuple[Host, Host],
        restarts: int,
        options: argparse.Namespace,
    ):
        sets = [f"train.strategy={strategy}", f"train.steps={STEPS_BETWEEN * options.cuts + LAST_STEPS}"]
        sets += [
            "checkpoint.every=5 steps",
            f"checkpoint.keep.last={KEEP}",
            f"train.lost_rank_seconds={SILENCE_SECONDS}",
        ]
        self.logs = [run.with_name(f"{run.name}-{place}.log") for place in range(2)]
        self._launchers = []
        for place, (host, log) in enumerate(zip(hosts, self.logs, strict=True)):
            starter = ["launch", "--nnodes", "2", "--node-rank", str(place), "--nproc-per-node", "1"]
            starter += ["--master-addr", hosts[0].address, "--master-port", str(PORT), "--restarts", str(restarts)]
            words = command(recipe, run, [*sets, *options.overrides], starter)
            environment = os.environ | {"GLOO_SOCKET_IFNAME": CABLE}
            with log.open("a") as file:
                self._launchers.append(subprocess.Popen(words, stderr=file, env=environment, preexec_fn=host.enter))

    @property
    def first(self) -> subprocess.Popen:
        return self._launchers[0]

    def said(self, place: int) -> str:
        return self.logs[place].read_text()

    def wait(self, seconds: float) -> list[int | None]:
        """Their exit codes; None for one that lives on."""
        until = time.monotonic() + seconds
        for launcher in self._launchers:
            try:
                launcher.wait(max(0.01, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
        return [launcher.poll() for launcher in self._launchers]

    def wait_for_step(self, run: Path, step: int) -> bool:
        return wait_until(lambda: last_step(run) >= step, self._launchers[0])

    def wait_until_said(self, words: list[str], since: list[int], seconds: float) -> float | None:
        """Seconds until each has said its words, after so many bytes; None if one has not."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if all(word in self.said(place)[since[place] :] for place, word in enumerate(words)):
                return time.monotonic() - began
            time.sleep(0.02)
        return None

    def kill(self) -> None:
        for launcher in self._launchers:
            launcher.terminate()
        if None in self.wait(30):
            for launcher in self._launchers:
                launcher.kill()
                launcher.wait()


def cut(recipe: Path, strategy: str, hosts: tuple[Host, Host], options: argparse.Namespace) -> list[str]:
    """All that is wrong with a training whose hosts were cut off from each other."""
    whole, run, chance = (
        options.work / f"{strategy}-whole",
        options.work / f"{strategy}-cut",
        random.Random(options.seed),
    )
    both, problems = Both(recipe, whole, strategy, hosts, 0, options), []
    if both.wait(UNTIL_SECONDS) != [0, 0]:
        both.kill()
        return [f"without a cut: {both.said(0)[-1500:]}\n{both.said(1)[-1500:]}"]
    for turn in range(options.cuts):
        restarts = turn % 2
        both = Both(recipe, run, strategy, hosts, restarts, options)
        try:
            problems += [f"cut {turn + 1}: {each}" for each in one_cut(both, run, turn, hosts, restarts, chance)]
        finally:
            hosts[1].plug(True)
            both.kill()
        problems += [f"cut {turn + 1}: {each}" for each in unsound(run, both.said(0), KEEP)]
    both = Both(recipe, run, strategy, hosts, 0, options)
    codes = both.wait(UNTIL_SECONDS)
    both.kill()
    problems += [] if codes == [0, 0] else [f"the last start ended with {codes}: {both.said(0)[-1500:]}"]
    return problems + differences(whole, run)


def one_cut(
    both: Both, run: Path, turn: int, hosts: tuple[Host, Host], restarts: int, chance: random.Random
) -> list[str]:
    at, before = STEPS_BETWEEN * turn + chance.randint(2, STEPS_BETWEEN), last_step(run)
    if not both.wait_for_step(run, max(at, before + 1)):
        return [f"the training ended before: {both.said(0)[-1500:]}\n{both.said(1)[-1500:]}"]
    if turn % 3 == 0:
        wait_until(lambda: is_saving(run), both.first)
    else:
        time.sleep(chance.random() / 20)
    since, step = [len(both.said(place)) for place in range(2)], last_step(run)
    hosts[1].plug(False)
    words = [
        f"rank {place}: lost another rank: rank {1 - place} on {hosts[1 - place].name} gave no sign of life"
        for place in range(2)
    ]
    seconds = both.wait_until_said(words, since, SILENCE_SECONDS + MORE_SECONDS)
    if seconds is None:
        return [f"not both say which rank they lost: {both.said(0)[since[0] :]}\n{both.said(1)[since[1] :]}"]
    print(f"cut at step {step}: both had said so after {seconds:.1f} s", flush=True)
    found = ["a traceback"] if "Traceback" in both.said(0) + both.said(1) else []
    if restarts:
        hosts[1].plug(True)
        return found if both.wait_for_step(run, step + 1) else [*found, f"no restart: {both.said(0)[-1500:]}"]
    codes = both.wait(MORE_SECONDS)
    return found if codes == [1, 1] else [*found, f"the launchers ended with {codes}"]


if __name__ == "__main__":
    main()
