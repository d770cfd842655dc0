"""The process that forks the commands of `tests.forks`, and what its forks do to be a process of their own."""

import array
import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import NoReturn

from tests.forks import SIGNALS, imported_with, is_python, line_of

HIGH = 300  # descriptors of the server's own lie here and above: a command may ask for lower ones
LIBRARIES = [
    "torch",
    "torch.distributed.run",
    "torch.distributed.algorithms.join",
    "torch.distributed.fsdp",
    "torch.nn.utils.rnn",
    "transformers",
    "transformers.modeling_utils",
    "transformers.trainer_utils",
    "transformers.masking_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "peft",
    "accelerate",
    "datasets",
    "gguf",
    "pyarrow.parquet",
    "safetensors.torch",
    "sqlite3",
]
"""Beside all of ours, and what these import."""
CLONE_NEWNS, CLONE_NEWPID, MS_REC, MS_PRIVATE, PR_SET_PDEATHSIG = 0x20000, 0x20000000, 0x4000, 0x40000, 1  # Linux
OF_HUGGING_FACE = ("huggingface_hub", "transformers", "datasets", "accelerate", "peft", "finetune")
_imported_with: set[tuple] = set()
_python_path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
_path = [entry for entry in sys.path[1:] if entry not in _python_path]
_of_subprocess = subprocess._fork_exec


def serve(orders_fd: int) -> None:
    """Forks one process an order until the orders end, and tells of each how it ended."""
    gc.disable()
    import_all()
    gc.freeze()  # else the collector of every fork writes into, and so copies, all pages that they share
    gc.enable()
    orders = _own(orders_fd)
    poller, running, is_over = select.poll(), {}, False
    poller.register(orders, select.POLLIN)
    while running or not is_over:
        for fd, _ in poller.poll():
            if fd in running:
                poller.unregister(fd)
                _tell_end(fd, *running.pop(fd))
            elif order := orders.recvmsg(1, 4096):
                if not order[0]:
                    poller.unregister(orders)
                    is_over = True
                    continue
                pid, told = _forked(array.array("i", order[1][0][2]))
                pidfd = _moved(os.pidfd_open(pid))
                poller.register(pidfd, select.POLLIN)
                running[pidfd] = pid, told
    os._exit(0)  # freeing all that was imported takes two seconds


def _forked(fds: array.array) -> tuple[int, socket.socket]:
    """The id of a new process, and where to tell of it."""
    told, given = _own(fds[0]), [_moved(fd) for fd in fds[1:]]
    order = json.loads(line_of(told))
    pid = os.fork()
    if not pid:
        _become(order, given)
    for fd in given:
        os.close(fd)
    with contextlib.suppress(OSError):  # the test that would hear of it may be over
        told.sendall(f"{pid}\n".encode())
    return pid, told


def _tell_end(pidfd: int, pid: int, told: socket.socket) -> None:
    _, status, used = os.wait4(pid, 0)
    os.close(pidfd)
    with contextlib.suppress(OSError), told:
        told.sendall(json.dumps([status, used.ru_utime + used.ru_stime]).encode() + b"\n")


def import_all() -> None:
    global _imported_with
    _imported_with = {imported_with(os.environ)}
    import finetune

    for name in (*LIBRARIES, *(each.name for each in pkgutil.walk_packages(finetune.__path__, "finetune."))):
        if not name.endswith("__main__"):
            importlib.import_module(name)
    _imported_with.add(imported_with(os.environ))  # what they set for themselves


def _moved(fd: int) -> int:
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
    if order["is_pid_1"]:
        _enter_namespace()
    _execute(order["words"], order["env"])


def _enter_namespace() -> None:
    """As `unshare --pid --fork --mount-proc --kill-child`: returns in the first process of the namespace."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: object) -> None:
        if getattr(libc, name)(*arguments):
            raise OSError(ctypes.get_errno(), name)

    call("unshare", CLONE_NEWPID | CLONE_NEWNS)
    if pid := os.fork():
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
    call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL))
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    call("mount", b"proc", b"/proc", b"proc", 0, None)


def _fork_exec(*all: object) -> int:
    """Stands for that of `subprocess` in forks: what starts this Python forks instead."""
    args, executables, close_fds, kept, cwd, env_list, p2cread, _, _, c2pwrite, _, errwrite, _, errpipe_write, *rest = (
        all
    )
    _, session, group, gid, gids, uid, umask, preexec_fn, *_ = rest
    words = [os.fsdecode(word) for word in args]
    env = dict(os.environ) if env_list is None else dict(os.fsdecode(item).split("=", 1) for item in env_list)
    is_ours = os.fsdecode(executables[0]) == words[0] and is_python(words) and imported_with(env) in _imported_with
    if not is_ours or (gid, gids, uid, umask) != (None, None, None, -1):
        return _of_subprocess(*all)
    for stream in (sys.stdout, sys.stderr):  # else the child writes what its parent has printed and not flushed, too
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
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
    tempfile.tempdir = None
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
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
    vars(datasets.config)["__HF_DATASETS_DISABLE_PROGRESS_BARS"] = said
    is_off = None if said is None else said.upper() in ("1", "ON", "YES", "TRUE")
    bars = sys.modules["datasets.utils.tqdm"]  # as an attribute it is a class
    datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS = bars.HF_DATASETS_DISABLE_PROGRESS_BARS = is_off
    bars._hf_datasets_progress_bars_disabled = bool(is_off)


def _program(words: list[str]) -> None:
    sys.orig_argv = [sys.executable, *words]
    flags = [word for word in words[:2] if word in ("-u", "-P")]
    first, *rest = words[len(flags) :]
    if "-u" in flags or os.environ.get("PYTHONUNBUFFERED"):
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    own = {"-c": "", "-m": os.getcwd()}.get(first, str(Path(first).resolve().parent))
    sys.path[:] = [*([] if "-P" in flags else [own]), *path, *_path]
    if any(Path(entry, "sitecustomize.py").is_file() for entry in path):
        importlib.import_module("sitecustomize")  # as `site` does: ckpt-chaos arms a training there
    if first == "-m":
        sys.argv = ["-m", *rest[1:]]
        runpy._run_module_as_main(rest[0])
        return
    sys.argv = ["-c", *rest[1:]] if first == "-c" else [first, *rest]
    code = compile(rest[0], "<string>", "exec") if first == "-c" else compile(Path(first).read_bytes(), first, "exec")
    main = type(sys)("__main__")
    if first != "-c":
        main.__file__ = first
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


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
