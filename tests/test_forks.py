"""A command in a fork is what it would be in a new process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forks

READ = """
import json, pathlib, sys
from tests.forked import OF_HUGGING_FACE, import_all
import_all()
import huggingface_hub
plain, found = (str, bool, int, float, type(None), pathlib.PurePath), {"endpoint": huggingface_hub.hf_api.api.endpoint}
for name, module in list(sys.modules.items()):
    if name.startswith(OF_HUGGING_FACE):
        found |= {f"{name}.{key}": str(value) for key, value in vars(module).items() if isinstance(value, plain)}
print(json.dumps(found))
"""
DIFFERENT = {  # in every process
    "transformers.utils.hub.SESSION_ID",
    "transformers.models.auto.tokenization_auto.model_type",
}


def python(*words: object, **options: object) -> subprocess.CompletedProcess:
    return forks.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=60, **options)


@pytest.mark.slow
def test_what_libraries_read_from_the_environment_is_what_a_new_process_reads(tmp_path) -> None:
    """All plain globals of Hugging Face's libraries and ours, in a fork and in a new interpreter."""
    env = os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:5555",
        "HF_HOME": str(tmp_path / "huggingface"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    new = subprocess.run([sys.executable, "-c", READ], env=env, capture_output=True, text=True, check=True, timeout=200)
    fresh, forked = json.loads(new.stdout), json.loads(python("-c", READ, env=env).stdout)
    found = {name: (fresh[name], forked.get(name)) for name in fresh if fresh[name] != forked.get(name)}
    assert {name: pair for name, pair in found.items() if name not in DIFFERENT} == {}
    assert str(tmp_path / "huggingface") in fresh["huggingface_hub.constants.HF_TOKEN_PATH"]


@pytest.mark.parametrize(
    ("code", "exit_code", "told"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('so')", 1, "so\n"),
        ("import os; os._exit(4)", 4, ""),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import atexit, sys; atexit.register(print, 'late', file=sys.stderr)", 0, "late\n"),
        (
            "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', '1 / 0']).returncode + 1)",
            2,
            "zero\n",
        ),
    ],
)
def test_a_fork_ends_as_a_process_does(code, exit_code, told) -> None:
    done = python("-c", code)
    assert done.returncode == exit_code and done.stderr.endswith(told)


def test_a_command_runs_sitecustomize_of_its_path_first(tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('first')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert python("-c", "print('then')", env=os.environ | {"PYTHONPATH": path}).stdout == "first\nthen\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="PID namespaces need root")
def test_a_fork_can_be_the_first_process_of_a_namespace() -> None:
    code = "import os, sys; print(os.getpid(), [n for n in os.listdir('/proc') if n.isdigit()]); sys.exit(7)"
    command = [*forks.AS_PID_1, sys.executable, "-c", code]
    new = subprocess.run(command, capture_output=True, text=True, timeout=60)
    done = forks.run(command, capture_output=True, text=True, timeout=60)
    assert (new.returncode, new.stdout) == (done.returncode, done.stdout) == (7, "1 ['1']\n")


def test_a_command_has_its_words_folder_environment_and_input(tmp_path) -> None:
    (tmp_path / "own.py").write_text(
        "import os, sys; print(__name__, sys.argv[1:], os.getcwd(), os.environ['X'], input())"
    )
    env = os.environ | {"X": "said"}
    for words in ((tmp_path / "own.py", "word"), ("-m", "own", "word")):
        done = python(*words, cwd=tmp_path, env=env, input="in\n")
        assert done.stdout == f"__main__ ['word'] {tmp_path} said in\n", done.stderr


def test_others_see_the_command_and_its_signals_arrive(tmp_path) -> None:
    process = forks.Popen(
        [sys.executable, "-c", "print('up', flush=True); input()", "word"], stdin=-1, stdout=-1, text=True
    )
    assert process.stdout.readline() == "up\n" and process.poll() is None
    assert Path(f"/proc/{process.pid}/cmdline").read_bytes().rstrip(b"\0").endswith(b"\0word")
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM


def test_what_a_fork_starts_is_a_fork_where_python_would_choose_a_locale_by_itself() -> None:
    nested = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import sys; print(len(sys.modules))'])"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LANG", "LC_"))}
    done = forks.run([sys.executable, "-c", nested], capture_output=True, text=True, check=True, env=env)
    assert int(done.stdout) > 1000  # a new Python has 60


def test_what_a_fork_starts_does_not_write_what_its_parent_has_printed() -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    started = "import subprocess, sys; print('parent'); subprocess.run([sys.executable, '-c', 'print(1)'], stdout=subprocess.DEVNULL)"
    assert python("-c", started, env=env).stdout == "parent\n"
    heard = started.replace("stdout=subprocess.DEVNULL", "stdout=sys.stderr")
    assert python("-c", heard, env=env).stderr == "1\n"


def test_what_a_fork_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="only subprocess starts"):
        forks.run(["true"])


def test_the_process_that_forks_has_one_thread_that_runs_python_and_none_of_torch() -> None:
    code = "import os; print([open(f'/proc/self/task/{one}/comm').read().strip() for one in os.listdir('/proc/self/task')])"
    assert len(json.loads(python("-c", code).stdout.replace("'", '"'))) == 1
