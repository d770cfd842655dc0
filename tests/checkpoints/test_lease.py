"""One writer a run, and a dead one holds nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.checkpoints import lease
from finetune.errors import RunError

HOLD = """
import sys
from pathlib import Path
from finetune.checkpoints import lease
held = lease.acquire(Path(sys.argv[1]), "first")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lease of `tmp_path / "run"`."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_and_told_who_holds_the_run(tmp_path, holder):
    with pytest.raises(RunError) as caught:
        lease.acquire(tmp_path / "run", "second")
    assert caught.value.where == str(tmp_path / "run")
    assert caught.value.message.startswith(f"is in use by process {holder.pid} on {os.uname().nodename} since ")
    assert caught.value.message.endswith("(attempt first)")
    assert caught.value.hint == "wait until it ends, stop it, or use another --run directory"


def test_a_holder_that_has_not_named_itself_yet_is_another_process(tmp_path, holder):
    (tmp_path / "run" / "lease.json").write_text("{")
    with pytest.raises(RunError, match="is in use by another process"):
        lease.acquire(tmp_path / "run", "second")


def test_the_lease_of_a_killed_process_is_free(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with lease.acquire(tmp_path / "run", "second") as taken:
        assert json.loads((taken.run / "lease.json").read_bytes())["attempt"] == "second"


def test_a_released_lease_is_free_within_the_same_process(tmp_path):
    run = tmp_path / "runs" / "a"
    with lease.acquire(run, "first"), pytest.raises(RunError, match="is in use by process"):
        lease.acquire(run, "second")
    lease.acquire(run, "second").release()


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


def test_an_unwritable_directory_is_named(unwritable):
    with pytest.raises(RunError, match="cannot write: permission denied\nhint: check owner and permissions"):
        lease.acquire(unwritable / "run", "a1")
