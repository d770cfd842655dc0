"""Processes for tests that cost no start: forks of a process that has imported everything already.

`Popen` and `run` are those of `subprocess`, for commands of this Python: `-m MODULE`, `-c CODE` or a script. Process, exit code,
signals, descriptors, environment and folder are real. So are those of what a command starts in turn. What Hugging Face's libraries
read from the environment is read again; for other variables that are read once (`HOME`, say) there is a process to fork for each.
"""

import array
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from subprocess import DEVNULL, PIPE  # noqa: F401 - for callers, beside Popen and run

ROOT = str(Path(__file__).parents[1])
END_SECONDS = 30
KEPT = 3  # servers at once; of more, the one that was used longest ago ends
ROOM = 40_000  # bytes: what `ps` shows of a command is written over what it shows of the server
SERVER = f"import sys; sys.path[0] = {ROOT!r}; from tests.forked import serve; serve(int(sys.argv[1]))"
READ_AT_IMPORT = (
    *("HUGGINGFACE_", "TRANSFORMERS_", "DATASETS_", "TORCHDYNAMO_", "TORCH_LOGS", "OMP_", "MKL_"),
    *("OPENBLAS_", "MALLOC_", "GLIBC_", "LD_", "HOME", "XDG_", "LC_"),
    *("PYTHONHASHSEED", "PYTHONWARNINGS", "PYTHONMALLOC", "PYTHONUTF8", "PYTHONIOENCODING", "PYTHONDEVMODE"),
)
FLAGS = ("-m", "-c", "-u", "-P")
AS_PID_1 = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
"""Before a command: it is the first process of a namespace, and its parent ends as it does. A fork can be that, as root."""
SIGNALS = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ})
"""Those that `exec` and `subprocess` leave ignored where they were."""
_servers: dict[tuple, "Server"] = {}
cpu_seconds = 0.0
"""Of commands that have ended, with what they started, where the system does not count them yet."""


def imported_with(env: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """What of an environment the libraries, the interpreter or the loader read when they start."""
    read = [(name, value) for name, value in env.items() if name.startswith(READ_AT_IMPORT)]
    entries = [entry for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry]
    ours = next((entry for entry in entries if Path(entry, "finetune").is_dir()), ROOT)
    return ("finetune", str(Path(ours).resolve())), *sorted(read)


def is_python(words: list[str]) -> bool:
    """Whether a fork can be this command."""
    return words[0] == sys.executable and len(words) > 1 and (words[1] in FLAGS or not words[1].startswith("-"))


class Either:
    """Stands for `subprocess` in modules of ours: their commands of this Python are forks as well, and others are not."""

    CompletedProcess, TimeoutExpired = subprocess.CompletedProcess, subprocess.TimeoutExpired
    DEVNULL, PIPE = subprocess.DEVNULL, subprocess.PIPE

    @staticmethod
    def run(command: list, **options: object) -> subprocess.CompletedProcess:
        words = [os.fspath(word) for word in command]
        return (run if is_python(words) else subprocess.run)(words, **options)

    @staticmethod
    def Popen(command: list, **options: object) -> subprocess.Popen:
        words = [os.fspath(word) for word in command]
        return (Popen if is_python(words) else subprocess.Popen)(words, **options)


class Server:
    """A process that forks; its commands outlive the end of its orders."""

    def __init__(self, env: dict[str, str]):
        self.told_seconds = 0.0
        self._orders, theirs = socket.socketpair()
        command = [sys.executable, "-c", SERVER, str(theirs.fileno()), "-" * ROOM]
        # as `launch` asks for; and what counts devices without what must not be forked
        env = env | {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "FORKS_ROOM": "-" * ROOM}
        env["PYTHONPATH"] = dict(imported_with(env))["finetune"]  # what else lies there is for the command
        env["PYTHONCOERCECLOCALE"] = (
            "0"  # without LANG Python would set LC_CTYPE, and no command that a fork starts would be a fork
        )
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], cwd=ROOT
        )
        theirs.close()

    def fork(self, order: dict, descriptors: list[int]) -> tuple[socket.socket, int]:
        """Where the end of the new process will be told, and its id."""
        told, theirs = socket.socketpair()
        fds = array.array("i", [theirs.fileno(), *descriptors])
        self._orders.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        theirs.close()
        told.sendall(json.dumps(order).encode() + b"\n")
        return told, json.loads(line_of(told))

    def close(self) -> None:
        """Waits for what still runs; from then on the system counts what the forks have told of their time."""
        global cpu_seconds
        self._orders.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:  # a test has left something running
            self._process.kill()
            self._process.wait()
        cpu_seconds -= self.told_seconds


class Popen(subprocess.Popen):
    """A command of this Python in a fork. What a fork cannot be (another user, a `preexec_fn`) is refused."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest) -> None:
        _, _, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, _, gid, gids, uid, umask, *group = rest
        words = [os.fspath(word) for word in args]
        is_pid_1 = words[: len(AS_PID_1)] == AS_PID_1
        words = words[len(AS_PID_1) :] if is_pid_1 else words
        is_same_user = (gid, gids, uid, umask) == (None, None, None, -1)
        if preexec_fn or shell or executable or not is_python(words) or not is_same_user:
            raise ValueError(f"only subprocess starts {words}")
        env = dict(os.environ if env is None else env)
        given = (p2cread, c2pwrite, errwrite)
        standard = [number if fd == -1 else fd for number, fd in enumerate(given)]
        ignored = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
        order = {"words": words, "env": env, "cwd": os.fspath(cwd or os.getcwd()), "fds": [0, 1, 2, *pass_fds]}
        self._server = _server(env)
        order |= {"group": group, "ignored": ignored, "is_pid_1": is_pid_1}
        self._told, self.pid = self._server.fork(order, [*standard, *pass_fds])
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        global cpu_seconds
        if not select.select([self._told], [], [], 0 if wait_flags else None)[0]:
            return 0, 0
        status, seconds = json.loads(line_of(self._told))
        cpu_seconds += seconds
        self._server.told_seconds += seconds
        self._told.close()
        return self.pid, status

    def _internal_poll(self, _deadstate: int | None = None, *_: object) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def run(command: list, *, input: str | bytes | None = None, capture_output: bool = False, timeout: float | None = None,
        check: bool = False, **options: object) -> subprocess.CompletedProcess:  # fmt: skip
    """As `subprocess.run`."""
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} if capture_output else {}
    options |= {"stdin": subprocess.PIPE} if input is not None else {}
    with Popen(list(command), **options) as process:
        try:
            out, err = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def close() -> None:
    while _servers:
        _servers.popitem()[1].close()


def _server(env: dict[str, str]) -> Server:
    key = imported_with(env)
    server = _servers.pop(key, None) or Server(env)
    while len(_servers) >= KEPT:
        _servers.pop(next(iter(_servers))).close()
    _servers[key] = server  # the last one used is the last one here
    return server


def line_of(told: socket.socket) -> bytes:
    """Byte by byte: what follows belongs to the next reader."""
    line = b""
    while not line.endswith(b"\n"):
        part = told.recv(1)
        if not part:
            raise RuntimeError("the process that forks has ended")
        line += part
    return line


def told_seconds() -> float:
    """CPU seconds of ended commands of the processes that fork now. What a command has started is told to that command alone."""
    return sum(server.told_seconds for server in _servers.values())


def used_by_children() -> float:
    """CPU seconds of all processes that were waited for: forks, and those of `subprocess`."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime + cpu_seconds
