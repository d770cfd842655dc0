"""A library that lets a torch without CUDA run autograd over fake `cuda` tensors. Imports no torch: the library comes first."""

import ctypes
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")
TORCH = Path(getattr(find_spec("torch"), "origin", None) or "torch/__init__.py").parent


def why_not() -> str | None:
    """Why this machine cannot have it; None if it can."""
    if shutil.which("g++") is None:
        return "needs g++"
    is_cuda = any(TORCH.glob("lib/libtorch_cuda*"))
    return "needs a torch built without CUDA, whose place the library takes" if is_cuda else None


def compiled(directory: Path) -> Path:
    """The library, compiled in two seconds."""
    path = directory / "no_device.so"
    compiler = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{TORCH}/include", SOURCE, "-o", path]
    linked = [f"-L{TORCH}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{TORCH}/lib"]
    subprocess.run([*compiler, *linked], check=True, capture_output=True)
    return path


def load(library: Path) -> None:
    """Before the first import of torch in this process."""
    ctypes.CDLL(str(library))
