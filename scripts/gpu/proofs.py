"""What has to hold on a GPU: versions and the device's own limits, tests, kernels, waits, exact resume, a signal."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from host import Host, OutOfTime, end

HERE = Path(__file__).parent
FINETUNE = (sys.executable, "-m", "finetune")
STOPPED_AFTER = 5  # steps
LEAST_SECONDS = 20  # to end in, and to resume
SAME_FILES = ("adapter_model.safetensors", "optimizer.safetensors")


def limits(host: Host) -> dict:
    """Versions, and what this device can do at most: a product of matrices, a copy, page-locked memory."""
    found = host.answer([sys.executable, HERE / "limits.py"], 120)
    doctor = host.run([*FINETUNE, "doctor", "--json"], 60)
    return found | {"ok": found["ok"] and doctor.code == 0, "doctor": json.loads(doctor.out) if not doctor.code else {}}


def tests(host: Host) -> dict:
    """The tests that are marked `gpu`."""
    options = ("-q", "-m", "gpu", "-p", "no:xdist", "-p", "no:cacheprovider", "--tb", "short")
    done = host.run([sys.executable, "-m", "pytest", "tests/gpu", *options], 300)
    return {"ok": done.code == 0, "seconds": done.seconds, "said": done.out[-2500:]}


def kernels(host: Host) -> dict:
    extra = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    found = host.answer([sys.executable, HERE / "same_bits.py"], 150, extra)
    return found | {"ok": found["ok"] and found["is_good"]}


def waits(host: Host, what: str, **sections: dict) -> dict:
    """A step may read the device once, and nothing else may wait for it."""
    found = _steps(host, "small", what, "-", **sections)
    is_cpu = found.get("devices") == ["cpu"]
    counts = [sum(each.values()) for each in found.get("waits", ())]
    return found | {"ok": found["ok"] and (is_cpu or counts == [1, 1]), "counts": counts}


def profile(host: Host, name: str, **sections: dict) -> dict:
    table = host.out / f"profile-{name}.txt"
    found = _steps(host, name, "profile", table, **sections)
    return found | {"table": table.name}


def _steps(host: Host, name: str, what: str, table: Path | str, **sections: dict) -> dict:
    place = host.work / "steps" / f"{name}-{what}"
    shutil.rmtree(place, ignore_errors=True)
    settings = {"steps": 8, "batch_size": 8, "micro_batch_tokens": 2 * host.workshop.length}
    sections["train"] = settings | sections.get("train", {})
    host.base(name)
    recipe = host.workshop.recipe(place / "recipe.yaml", name, rows=64, **sections)
    return host.answer([sys.executable, HERE / "steps.py", recipe, place / "run", table], 200)


def exact(host: Host, what: str, has_package: bool, **sections: dict) -> dict:
    """A run that is killed and resumed equals one that is not, to the bit: `finetune rehearse`."""
    place = host.work / "exact" / what
    shutil.rmtree(place, ignore_errors=True)
    recipe = _mixed(host, place, 100, **sections)
    options = ["--steps", "4", "--json", *([] if has_package else ["--no-package"])]
    done = host.run([*FINETUNE, "rehearse", recipe, "--run", place / "run", *options], 240)
    if not done.out.strip():
        return {"ok": False, "error": done.reason}
    facts = json.loads(done.out)
    found = {"ok": done.code == 0, "seconds": done.seconds}
    if "error" in facts:
        return found | {"error": facts["error"]["message"]}
    kept = ("first_difference", "compared", "step_seconds", "checkpoint", "package")
    return found | {key: facts[key] for key in kept}


def stopped(host: Host, **sections: dict) -> dict:
    """SIGTERM in a step: 143, a commit, and after a resume the bits of an uninterrupted run."""
    place = host.work / "sigterm"
    shutil.rmtree(place, ignore_errors=True)
    recipe = _mixed(host, place, 24, **sections)
    runs = [place / "stopped", place / "whole"]
    command = [*FINETUNE, "launch", "--nproc-per-node", "1", recipe, "--run", runs[0], "--quiet"]
    code, seconds = _signalled(host, command, runs[0] / "journal.jsonl")
    codes = [host.run([*FINETUNE, "train", recipe, "--run", run, "--quiet"], 150).code for run in runs]
    pairs = [[run / "checkpoints/step-00000024" / name for run in runs] for name in SAME_FILES]
    is_same = all(path.exists() for pair in pairs for path in pair)
    is_same = is_same and all(one.read_bytes() == other.read_bytes() for one, other in pairs)
    return {
        "ok": code == 143 and is_same,
        "code": code,
        "seconds_to_end": seconds,
        "codes": codes,
        "same_bits": is_same,
    }


def _signalled(host: Host, command: list, journal: Path) -> tuple[int | None, float]:
    """Starts a training, and ends it by a signal once it has made some steps; its exit code, and how long it took to end."""
    process = host.start(command)
    try:
        while process.poll() is None:
            if host.left < LEAST_SECONDS:
                raise OutOfTime
            if journal.exists() and journal.read_text().count('"learning_rate"') >= STOPPED_AFTER:
                break
            time.sleep(0.02)
        sent = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        return None, 100.0
    finally:
        end(process)
    return process.returncode, round(time.monotonic() - sent, 2)


def _mixed(host: Host, place: Path, steps: int, **sections: dict) -> Path:
    settings = {"steps": steps, "batch_size": 8, "micro_batch_tokens": 2 * host.workshop.length}
    sections["train"] = settings | sections.get("train", {})
    host.base("small")
    return host.workshop.recipe(place / "recipe.yaml", "small", rows=400, is_mixed=True, **sections)
