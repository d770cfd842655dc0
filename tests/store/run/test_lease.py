"""One writer a run, and a dead one holds nothing: real processes, with the file system's locks and without them."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from finetune.errors import RunError
from finetune.store.run import holder as holders
from finetune.store.run import lease

# Does what it reads: "acquire DIRECTORY ATTEMPT [--take-over]", "check", "release"; answers "ok" or the error.
PROCESS = """
import json, os, signal, sys
from pathlib import Path
from finetune.store.run import lease
from finetune.errors import RunError

lease.HEARTBEAT_SECONDS, lease.STALE_SECONDS = 0.05, 1.5
if sys.argv[1]:
    os.rename = lambda *names: os.kill(os.getpid(), getattr(signal, sys.argv[1])) or os.replace(*names)
print(os.getpid(), flush=True)
for line in sys.stdin:
    command, *arguments = line.split()
    try:
        if command == "acquire":
            held = lease.acquire(Path(arguments[0]), arguments[1], take_over="--take-over" in arguments)
        else:
            getattr(held, command)()
        print(json.dumps("ok"), flush=True)
    except RunError as error:
        print(json.dumps(str(error)), flush=True)
"""
STRACE = ["strace", "-f", "--seccomp-bpf", "-qq", "-o", "/dev/null", "-e", "trace=flock,pwrite64"]
NO_LOCKS = [*STRACE, "-e", "inject=flock:error=ENOLCK"]
without_locks = pytest.mark.skipif(not shutil.which("strace"), reason="strace takes the locks away from a process")


class Process:
    def __init__(self, prefix: list[str], signal_before_rename: str):
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
        command = [*prefix, sys.executable, "-c", PROCESS, signal_before_rename]
        self.popen = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = int(self.popen.stdout.readline())  # that of strace's child where there is strace

    def tell(self, *words: object) -> None:
        self.popen.stdin.write(" ".join(map(str, words)) + "\n")
        self.popen.stdin.flush()

    def answer(self) -> str:
        return json.loads(self.popen.stdout.readline())

    def ask(self, *words: object) -> str:
        self.tell(*words)
        return self.answer()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.popen.wait()

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        self.wait_until_stopped()

    def wait_until_stopped(self) -> None:
        stat = Path(f"/proc/{self.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] not in "Tt":
            time.sleep(0.005)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


@pytest.fixture
def start():
    """Starts a process; all of them end with the test."""
    started = []

    def start_one(*prefix, signal_before_rename="") -> Process:
        started.append(Process(list(prefix), signal_before_rename))
        return started[-1]

    yield start_one
    for process in started:
        if process.popen.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.popen.wait()
        process.popen.stdin.close()
        process.popen.stdout.close()


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.3)


def recorded(run: Path) -> holders.Holder:
    return holders.read(run / "lease.json")


def record(run: Path, **changes: object) -> holders.Holder:
    """A lease with a heartbeat, as a process of another machine would have left it."""
    holder = holders.this_process("first", beat="000000000007")
    holder = replace(holder, **({"host": "elsewhere", "pid": 4711, "boot_id": "another"} | changes))
    run.mkdir()
    (run / "lease.json").write_text(json.dumps(asdict(holder)))
    return holder


def test_a_second_process_is_refused_and_told_who_holds_the_run(run, start):
    first = start()
    first.ask("acquire", run, "first")
    with pytest.raises(RunError) as caught:
        lease.acquire(run, "second")
    assert caught.value.where == str(run)
    assert caught.value.message.startswith(f"is in use by process {first.pid} on {os.uname().nodename} since ")
    assert caught.value.message.endswith("(attempt first)")
    assert caught.value.hint == "wait until it ends, stop it, or use another --run directory"


def test_a_lock_that_is_held_is_not_taken_over_even_where_its_holder_stands_still(run, start):
    first = start()
    first.ask("acquire", run, "first")
    first.stop()
    with pytest.raises(RunError) as caught:
        lease.acquire(run, "second", take_over=True)
    assert caught.value.hint.startswith("its lock is held, so it lives, and --take-over does not help: wait until")


@pytest.mark.parametrize("text", ["{", '{"host": 1}', "[]"])
def test_a_holder_that_cannot_be_told_is_another_process(run, start, text):
    first = start()
    first.ask("acquire", run, "first")
    (run / "lease.json").write_text(text)
    with pytest.raises(RunError, match="is in use by another process"):
        lease.acquire(run, "second")
    assert first.ask("check") == "ok"  # the lock is the truth


def test_a_holder_that_has_not_named_itself_yet_is_not_confused_with_the_one_before(run):
    lease.acquire(run, "first").release()
    with (run / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="is in use by another process"):
            lease.acquire(run, "second")


def test_the_lease_of_a_killed_process_is_free_and_the_dead_one_is_named(run, start):
    first = start()
    first.ask("acquire", run, "first")
    first.kill()
    with lease.acquire(run, "second") as taken:
        assert str(taken.previous).startswith(f"process {first.pid} on ")
        assert recorded(run).attempt == "second"
        taken.check()


def test_a_released_lease_is_free_within_the_same_process(tmp_path):
    run = tmp_path / "runs" / "a"
    with lease.acquire(run, "first") as first, pytest.raises(RunError, match="is in use by process"):
        lease.acquire(run, "second")
    second = lease.acquire(run, "second")
    assert (first.previous, second.previous) == (None, None)
    second.release()
    assert sorted(path.name for path in run.iterdir()) == ["lease.json", "lock"]


def test_a_lease_from_before_heartbeats_is_that_of_a_lock(run):
    run.mkdir()
    old = {"host": "h", "boot_id": None, "pid": 7, "attempt": "a1", "since": "2026-01-01T00:00:00+00:00"}
    (run / "lease.json").write_text(json.dumps(old))
    with lease.acquire(run, "second") as taken:
        assert str(taken.previous) == "process 7 on h since 2026-01-01T00:00:00+00:00 (attempt a1)"


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    for run in (tmp_path / "run", tmp_path / "run" / "a"):
        with pytest.raises(RunError, match="cannot write: .*\nhint: a file is where a directory should be"):
            lease.acquire(run, "a1")


@pytest.fixture
def unwritable(tmp_path):
    """A directory that this process may not write, even where it was started by root."""
    tmp_path.chmod(0o500)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield tmp_path
    os.seteuid(user)
    tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    "names", [("train.csv",), ("rows.jsonl", "a.csv", "b.csv", "c.csv"), ("recipe.yaml",), ("lock", "x")]
)
def test_a_directory_with_other_files_is_no_place_for_a_run(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("mine")
    with pytest.raises(RunError, match="is not empty, and is not a run: it has ") as caught:
        lease.acquire(tmp_path, "a1")
    assert "new or empty with --run" in caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} == set(names)


@pytest.mark.parametrize(
    "names", [(), (".gitkeep", "lost+found"), ("train.log", "slurm-7.out"), ("lock",), ("plan.json", "x")]
)
def test_an_empty_directory_or_one_of_a_run_is(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("")
    lease.acquire(tmp_path, "a1").release()
    lease.acquire(tmp_path, "a2").release()


def test_a_file_system_that_takes_no_directories_is_said():
    with pytest.raises(
        RunError, match="cannot write: this file system takes no new directories\nhint: use a directory on"
    ):
        lease.acquire(Path("/proc/run"), "a1")


def test_an_unwritable_directory_is_named(unwritable):
    with pytest.raises(RunError, match="cannot write: permission denied\nhint: check owner and permissions"):
        lease.acquire(unwritable / "run", "a1")


@without_locks
def test_without_locks_a_second_process_is_refused_and_a_beating_heart_cannot_be_taken_over(run, start):
    first, second = start(*NO_LOCKS), start(*NO_LOCKS)
    assert first.ask("acquire", run, "first") == "ok"
    os.utime(run / "lease.json", (0, 0))  # clocks decide nothing
    refusal, hint = second.ask("acquire", run, "second").splitlines()
    assert f"is in use by process {first.pid} on " in refusal
    assert refusal.endswith("seconds ago")
    assert hint == (
        "hint: if it is dead: `finetune train --take-over` waits 2 seconds for a heartbeat, and goes on if there is none"
    )
    refusal = second.ask("acquire", run, "second", "--take-over")
    assert "(attempt first), which is alive\n" in refusal
    assert (first.ask("check"), first.ask("release")) == ("ok", "ok")
    assert second.ask("acquire", run, "second") == "ok"


@without_locks
def test_without_locks_a_killed_process_of_this_machine_holds_nothing(run, start):
    first, second = start(*NO_LOCKS), start(*NO_LOCKS)
    first.ask("acquire", run, "first")
    first.kill()
    assert second.ask("acquire", run, "second") == "ok"
    assert recorded(run).pid == second.pid


@without_locks
def test_a_process_that_stood_still_and_was_taken_over_can_neither_commit_nor_take_the_lease_back(run, start):
    first, second = start(*NO_LOCKS), start(*NO_LOCKS)
    first.ask("acquire", run, "first")
    first.stop()
    assert second.ask("acquire", run, "second", "--take-over") == "ok"
    first.go_on()
    time.sleep(0.2)  # some heartbeats
    assert f"was taken over by process {second.pid} on " in first.ask("check")
    assert first.ask("release") == "ok"
    assert (recorded(run).attempt, recorded(run).released) == ("second", None)
    assert second.ask("check") == "ok"


def test_a_lease_of_another_machine_is_taken_over_on_request_only(run, quick):
    dead = record(run)
    os.utime(run / "lease.json", (time.time() - 3600,) * 2)
    with pytest.raises(
        RunError, match=r"4711 on elsewhere .*, whose last heartbeat was 36\d\d seconds ago\nhint: if it"
    ):
        lease.acquire(run, "second")
    with lease.acquire(run, "second", take_over=True) as taken:
        assert taken.previous == dead


def test_a_lease_of_the_future_is_judged_by_its_heartbeat(run, quick):
    record(run)
    os.utime(run / "lease.json", (time.time() + 3600,) * 2)
    with pytest.raises(RunError, match="whose last heartbeat was 0 seconds ago"):
        lease.acquire(run, "second")
    lease.acquire(run, "second", take_over=True).release()


@without_locks
def test_a_lock_that_cannot_be_seen_is_not_taken_over(run, start):
    holding, blind = start(), start(*NO_LOCKS)
    holding.ask("acquire", run, "first")
    refusal = blind.ask("acquire", run, "second", "--take-over")
    assert refusal.endswith(f"cannot be seen from here; if you are sure that it is dead, remove {run / 'lease.json'}")


@pytest.mark.slow
@without_locks
def test_of_processes_that_take_over_at_the_same_moment_one_wins(tmp_path, start):
    contenders = [start(*NO_LOCKS) for _ in range(3)]
    for number in range(40):
        run = tmp_path / str(number)
        if number % 3:
            record(run, **asdict(replace(holders.this_process("dead", beat="000000000001"), pid=2**30)))
        for contender in contenders:
            contender.tell("acquire", run, f"a{contender.pid}")
        answers = [contender.answer() for contender in contenders]
        assert answers.count("ok") == 1, answers
        winner = contenders[answers.index("ok")]
        assert recorded(run).pid == winner.pid
        assert winner.ask("check") == winner.ask("release") == "ok"


@without_locks
def test_a_claim_dies_with_its_process(run, start):
    first, second = start(*NO_LOCKS, signal_before_rename="SIGKILL"), start(*NO_LOCKS)
    first.tell("acquire", run, "first")
    first.popen.wait()
    assert not (run / "lease.json").exists()
    assert second.ask("acquire", run, "second") == "ok"
    assert sorted(path.name for path in run.iterdir()) == ["lease.json", "lock"]


@without_locks
def test_a_claim_that_was_taken_over_cannot_be_made_good(run, start):
    first, second = (start(*NO_LOCKS, signal_before_rename="SIGSTOP") for _ in range(2))
    first.tell("acquire", run, "first")
    wait_for_claims(run, 1)
    first.wait_until_stopped()
    assert f"is in use by process {first.pid} on " in second.ask("acquire", run, "second")
    second.tell("acquire", run, "second", "--take-over")
    wait_for_claims(run, 2)
    second.wait_until_stopped()
    first.go_on()
    assert "is in use by another process, which came first at this very moment" in first.answer()
    second.go_on()
    assert (second.answer(), second.ask("check")) == ("ok", "ok")


def wait_for_claims(run: Path, count: int) -> None:
    while len(list(run.glob("*.next"))) < count:
        time.sleep(0.005)


@without_locks
def test_a_heart_that_cannot_be_written_for_a_while_leaves_the_lease_valid_and_beats_again(run, start):
    first = start(*NO_LOCKS, "-e", "inject=pwrite64:error=ENOSPC:when=2..5")  # of each thread's writes
    first.ask("acquire", run, "first")
    while recorded(run).beat != "000000000001":
        time.sleep(0.005)
    assert first.ask("check") == "ok"
    while recorded(run).beat < "000000000006":
        time.sleep(0.005)
    assert (first.ask("check"), first.ask("release")) == ("ok", "ok")
    assert recorded(run).released is None  # that write failed as well


@without_locks
def test_the_heart_does_not_keep_its_process_alive(run, start):
    first = start(*NO_LOCKS)
    first.ask("acquire", run, "first")
    first.popen.stdin.close()
    assert first.popen.wait(timeout=60) == 0


def no_locks(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_the_heart_beats_until_the_release_and_a_lease_that_was_removed_is_lost(run, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.01)
    held = lease.acquire(run, "first")
    while recorded(run).beat < "000000000001":
        time.sleep(0.001)
    assert recorded(run).attempt == "first"
    held.release()
    assert recorded(run).released is not None
    (run / "lease.json").unlink()
    with pytest.raises(RunError, match="was taken over by nobody: somebody removed lease.json"):
        held.check()
