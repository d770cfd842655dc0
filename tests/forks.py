"""Processes for tests that cost no start: forks of a process that has imported everything already.

`Popen` and `run` are those of `subprocess`, for commands of this Python: `-m MODULE`, `-c CODE` or a script. Process, exit code,
signals, descriptors, environment and folder are real. So are those of what a command starts in turn. What Hugging Face's libraries
read from the environment is read again; for other variables that are read once (`HOME`, say) there is a process to fork for each.
"""

import array
import atexit
import contextlib
import ctypes
import importlib
import json
import os
import pkgutil
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from subprocess import DEVNULL, PIPE  # noqa: F401 - for callers, beside Popen and run
from typing import NoReturn

ROOT = str(Path(__file__).parents[1])
HIGH = 300  # descriptors of the server's own lie here and above: a command may ask for lower ones
KEPT = 3  # servers at once; of more, the one that was used longest ago ends
ROOM = 40_000  # bytes: what `ps` shows of a command is written over what it shows of the server
SERVER = f"import sys; sys.path[0] = {ROOT!r}; from tests.forks import serve; serve(int(sys.argv[1]))"
READ_AT_IMPORT = (
    *("HUGGINGFACE_", "TRANSFORMERS_", "DATASETS_", "TORCHDYNAMO_", "TORCH_LOGS", "OMP_", "MKL_"),
    *("OPENBLAS_", "MALLOC_", "GLIBC_", "LD_", "HOME", "XDG_", "LC_"),
    *("PYTHONHASHSEED", "PYTHONWARNINGS", "PYTHONMALLOC", "PYTHONUTF8", "PYTHONIOENCODING", "PYTHONDEVMODE"),
)
LIBRARIES = (
    *(
        "torch",
        "torch.distributed.run",
        "torch.distributed.algorithms.join",
        "torch.distributed.fsdp",
        "torch.nn.utils.rnn",
    ),
    *("transformers", "transformers.modeling_utils", "transformers.trainer_utils", "transformers.masking_utils"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto", "peft", "accelerate"),
    *(
        "transformers.models.llama.modeling_llama",
        "datasets",
        "gguf",
        "pyarrow.parquet",
        "safetensors.torch",
        "sqlite3",
    ),
)
FLAGS = ("-m", "-c", "-u", "-P")
OF_HUGGING_FACE = ("huggingface_hub", "transformers", "datasets", "accelerate", "peft", "finetune")
SIGNALS = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ})
"""Those that `exec` and `subprocess` leave ignored where they were."""
_servers: dict[tuple, "Server"] = {}
cpu_seconds = 0.0
"""Of commands that have ended, with what they started, where the system does not count them yet."""


def imported_with(env: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """What of an environment the libraries, the interpreter or the loader read when they start."""
    read = [(name, value) for name, value in env.items() if name.startswith(READ_AT_IMPORT)]
    path = [
        entry for entry in env.get("PYTHONPATH", "").split(os.pathsep) if Path(entry, "finetune").is_dir() and entry
    ]
    return ("finetune", str(Path(*path[:1]).resolve()) if path else ROOT), *sorted(read)


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
        return told, json.loads(_line(told))

    def close(self) -> None:
        """Waits for what still runs; from then on the system counts what the forks have told of their time."""
        global cpu_seconds
        self._orders.close()
        self._process.wait()
        cpu_seconds -= self.told_seconds


class Popen(subprocess.Popen):
    """A command of this Python in a fork. What a fork cannot be (another user, a `preexec_fn`) is refused."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest) -> None:
        _, _, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, _, gid, gids, uid, umask, *group = rest
        words = [os.fspath(word) for word in args]
        if (
            preexec_fn
            or shell
            or executable
            or words[0] != sys.executable
            or (gid, gids, uid, umask) != (None,) * 3 + (-1,)
        ):
            raise ValueError(f"only subprocess starts {words}")
        env = dict(os.environ if env is None else env)
        given = (p2cread, c2pwrite, errwrite)
        standard = [number if fd == -1 else fd for number, fd in enumerate(given)]
        ignored = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
        order = {"words": words, "env": env, "cwd": os.fspath(cwd or os.getcwd()), "fds": [0, 1, 2, *pass_fds]}
        self._server = _server(env)
        self._told, self.pid = self._server.fork(order | {"group": group, "ignored": ignored}, [*standard, *pass_fds])
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        global cpu_seconds
        if not select.select([self._told], [], [], 0 if wait_flags else None)[0]:
            return 0, 0
        status, seconds = json.loads(_line(self._told))
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


def _line(told: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        part = told.recv(1)
        if not part:
            raise RuntimeError("the process that forks has ended")
        line += part
    return line


# What follows runs in the process that forks, and in its forks.


def serve(orders_fd: int) -> None:
    """Forks one process an order until the orders end, and tells of each how it ended."""
    _import_all()
    orders = _own(orders_fd)
    poller, running = select.poll(), {}
    poller.register(orders, select.POLLIN)
    is_over = False
    while running or not is_over:
        for fd, _ in poller.poll():
            if fd != orders.fileno():
                pid, told = running.pop(fd)
                _, status, used = os.wait4(pid, 0)
                poller.unregister(fd)
                os.close(fd)
                with contextlib.suppress(OSError), told:  # the test that would hear of it may be over
                    told.sendall(json.dumps([status, used.ru_utime + used.ru_stime]).encode() + b"\n")
                continue
            data, ancillary, *_ = orders.recvmsg(1, 4096)
            if not data:
                poller.unregister(orders)
                is_over = True
                continue
            fds = array.array("i", ancillary[0][2])
            told, given = _own(fds[0]), [_moved(fd) for fd in fds[1:]]
            order = json.loads(_line(told))
            pid = os.fork()
            if not pid:
                _become(order, given)
            for one in given:
                os.close(one)
            pidfd = _moved(os.pidfd_open(pid))
            poller.register(pidfd, select.POLLIN)
            running[pidfd] = pid, told
            with contextlib.suppress(OSError):
                told.sendall(f"{pid}\n".encode())
    os._exit(0)  # freeing all that was imported takes two seconds


def _import_all() -> None:
    global _imported_with
    _imported_with = {imported_with(os.environ)}
    import finetune

    for name in (*LIBRARIES, *(each.name for each in pkgutil.walk_packages(finetune.__path__, "finetune."))):
        if not name.endswith("__main__"):
            importlib.import_module(name)
    _imported_with.add(imported_with(os.environ))  # what they set for themselves


_imported_with: set[tuple] = set()
_python_path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


def _moved(fd: int) -> int:
    import fcntl

    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH)
    os.close(fd)
    return moved


def _own(fd: int) -> socket.socket:
    return socket.socket(fileno=_moved(fd))


def _become(order: dict, given: list[int]) -> NoReturn:
    """The process of an order from the server's fork on."""
    for fd, number in zip(given, order["fds"], strict=True):
        os.dup2(fd, number)
    os.closerange(HIGH, HIGH + 700)
    is_session, group = order["group"]
    if is_session:
        os.setsid()
    if group != -1:
        os.setpgid(0, group)
    os.chdir(order["cwd"])
    for number in SIGNALS:
        is_int = number == signal.SIGINT
        default = signal.default_int_handler if is_int else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in order["ignored"] else default)
    _execute(order["words"], order["env"])


def _fork_exec(args, executables, close_fds, kept, cwd, env_list, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite,
               errpipe_read, errpipe_write, restore, session, group, gid, gids, uid, umask, preexec_fn, vfork) -> int:  # fmt: skip
    """Stands for that of `subprocess` in forks: what starts this Python forks instead."""
    words = [os.fsdecode(word) for word in args]
    env = dict(os.environ) if env_list is None else dict(os.fsdecode(item).split("=", 1) for item in env_list)
    is_ours = os.fsdecode(executables[0]) == words[0] and is_python(words) and imported_with(env) in _imported_with
    if not is_ours or (gid, gids, uid, umask) != (None, None, None, -1):
        return _of_subprocess(args, executables, close_fds, kept, cwd, env_list, p2cread, p2cwrite, c2pread, c2pwrite,
                              errread, errwrite, errpipe_read, errpipe_write, restore, session, group, gid, gids, uid,
                              umask, preexec_fn, vfork)  # fmt: skip
    pid = os.fork()
    if pid:
        return pid
    try:
        given = [os.dup(number if fd == -1 else fd) for number, fd in enumerate((p2cread, c2pwrite, errwrite))]
        for number, fd in enumerate(given):
            os.dup2(fd, number)
            os.set_inheritable(number, True)
        if cwd is not None:
            os.chdir(cwd)
        if session:
            os.setsid()
        if group != -1:
            os.setpgid(0, group)
        _forget_signals()
        if preexec_fn:
            preexec_fn()
        for fd in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, *kept} if close_fds else ():
            with contextlib.suppress(OSError):
                os.close(fd)
    except BaseException as error:  # noqa: BLE001 - told to the parent, as the one in C does
        os.write(errpipe_write, f"SubprocessError:0:{error}".encode())
        os._exit(255)
    os.close(errpipe_write)
    _execute(words, env)


_of_subprocess = subprocess._fork_exec


def _forget_signals() -> None:
    """As `exec`: what is ignored stays so, and what was handled is not."""
    for number in SIGNALS:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.set_wakeup_fd(-1)


def _execute(words: list[str], env: dict[str, str]) -> NoReturn:
    """Runs `python WORDS` in this process to its end."""
    subprocess._fork_exec = _fork_exec
    atexit._clear()
    _forget_signals()
    os.environ.clear()
    os.environ.update(env)
    _show(words, env)
    _read_again()
    import tempfile

    tempfile.tempdir = None
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "__mp_main__")]:
        if name != __name__:
            del sys.modules[name]
    code = 1
    try:
        _program(words[1:])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = -signal.SIGINT
        traceback.print_exc()
    except BaseException:  # noqa: BLE001 - the interpreter's own end
        sys.excepthook(*sys.exc_info())
    _end(code)


def _read_again() -> None:
    """What Hugging Face's libraries took from the environment as they were imported, where it says something else now."""
    import datasets
    import huggingface_hub
    from huggingface_hub import constants
    from transformers.utils import logging

    before = dict(vars(constants))
    importlib.reload(constants)
    changed = {name: (old, vars(constants)[name]) for name, old in before.items() if name.isupper()}
    changed = {name: pair for name, pair in changed.items() if pair[0] != pair[1]}
    if not changed:
        return
    moved = [changed[name] for name in ("HF_HOME", "ENDPOINT") if name in changed]
    for module in [sys.modules[name] for name in sys.modules if name.startswith(OF_HUGGING_FACE)]:
        if module is constants:
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, (str, Path)):
                for old, new in moved:
                    if str(value).startswith(old):
                        setattr(module, name, type(value)(new + str(value)[len(old) :]))
            elif name in changed and value is changed[name][0]:
                setattr(module, name, changed[name][1])
    huggingface_hub.hf_api.api.endpoint = constants.ENDPOINT
    datasets.config.HF_DATASETS_OFFLINE = constants.HF_HUB_OFFLINE
    logging._tqdm_active = not constants.HF_HUB_DISABLE_PROGRESS_BARS
    said = os.environ.get("HF_DATASETS_DISABLE_PROGRESS_BARS")
    is_off = None if said is None else said.upper() in ("1", "ON", "YES", "TRUE")
    bars = sys.modules["datasets.utils.tqdm"]  # as an attribute it is a class
    datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS = bars.HF_DATASETS_DISABLE_PROGRESS_BARS = is_off
    bars._hf_datasets_progress_bars_disabled = bool(is_off)


def _program(words: list[str]) -> None:
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[1:] = [*path, *(entry for entry in sys.path[1:] if entry not in _python_path)]
    sys.orig_argv = [sys.executable, *words]
    flags = [word for word in words[:2] if word in ("-u", "-P")]
    first, *rest = words[len(flags) :]
    if "-u" in flags or os.environ.get("PYTHONUNBUFFERED"):
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif first == "-m":
        sys.argv, sys.path[0] = ["-m", *rest[1:]], os.getcwd()
        runpy._run_module_as_main(rest[0])
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).resolve().parent)
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        main.__file__ = first
        exec(compile(Path(first).read_bytes(), first, "exec"), main.__dict__)


def _end(code: int) -> NoReturn:
    """As the interpreter ends, but for what it would free."""
    with contextlib.suppress(BaseException):
        threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            code = code or (120 if stream is sys.stdout and stream else 0)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


def _show(words: list[str], env: dict[str, str]) -> None:
    """The command and its environment to those who look at this process from outside."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    arg_start, arg_end, env_start, env_end = map(int, fields[45:49])
    for start, end, items in ((arg_start, arg_end, words), (env_start, env_end, [f"{k}={v}" for k, v in env.items()])):
        text = b"".join(os.fsencode(item) + b"\0" for item in items)[: end - start - 1]
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, text, len(text))


def used_by_children() -> float:
    """CPU seconds of all processes that were waited for: forks, and those of `subprocess`."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime + cpu_seconds
