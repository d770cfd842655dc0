"""A GPU host's acceptance: `accept.py [ITEM...] --out FOLDER [--seconds N] [--work FOLDER] [--again] [--tiny]`.

limits   versions, and what the device does at most
tests    the tests that are marked `gpu`
kernels  against fp64 and against themselves
waits    where the host waits for the device in a step
exact    a killed and resumed run beside one that was not, to the bit
sigterm  a signal in a step, a resume, the same bits
small    135M shape: ours, a bare loop, with Liger, Trainer, SFTTrainer
large    8B shape, LoRA: the same, and memory chosen by `auto`
nf4      the same on a base in 4 bits
middle   1.7B shape, every weight, with saves
profile  the operators of a step

ITEM is one of these parts, or PART/NAME. Items are done in order while time is left; what an earlier call did stays (unless --again), so the same
command is repeated until it says that nothing is left. FOLDER gets report.json, page.md (for docs/benchmarks.md), log.txt and profiles.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import proofs
import report
import speed
from host import Failed, Host, OutOfTime

DROPOUT = speed.LORA | {"dropout": 0.1}
SAVING, BF16, NF4 = {"activation_checkpointing": True}, {"weights": "bf16"}, {"quantization": "nf4"}


class Item(NamedTuple):
    name: str
    """`part/what`"""
    seconds: float
    """About what it takes: with less left it is not begun."""
    do: Callable[[Host], dict]


def items(is_tiny: bool) -> list[Item]:
    """Two calls of ten minutes do what has to hold; a third does what else is worth knowing."""
    few, some = (4, 4) if is_tiny else (8, 16)
    return [*_proofs(), *_small(some), *_large(few), *_middle(some), *_further(few, some)]


def _proofs() -> list[Item]:
    return [
        Item("limits/device", 30, proofs.limits),
        Item("tests/gpu", 60, proofs.tests),
        Item("kernels/all", 30, proofs.kernels),
        Item("waits/full", 25, partial(proofs.waits, what="full")),
        Item("waits/lora", 25, partial(proofs.waits, what="lora", adapter=DROPOUT, train=SAVING)),
        Item("exact/full", 70, partial(proofs.exact, what="full", has_package=True)),
        Item("exact/lora", 50, partial(proofs.exact, what="lora", has_package=False, adapter=DROPOUT, train=SAVING)),
        Item("sigterm/launch", 50, partial(proofs.stopped, adapter=DROPOUT)),
    ]


def _small(batch: int) -> list[Item]:
    made = {"batch": batch, "steps": 12}
    return [
        _ours("small/finetune", 30, "small", **made),
        _ours("small/finetune, mixed lengths", 30, "small", batch=4 * batch, steps=12, is_mixed=True),
        *_others("small", 20, ("bare", "bare-liger", "trainer", "sft"), **made, micro=4),
    ]


def _large(batch: int) -> list[Item]:
    made = {"batch": batch, "steps": 7}
    beside = {"is_lora": True, "dtype": "bfloat16"}
    return [
        _ours("large/finetune", 55, "large", **made, adapter=speed.LORA, micro=2),
        _ours("large/finetune, bf16", 50, "large", **made, adapter=speed.LORA, micro=2, train=BF16),
        *_others("large", 45, ("bare", "bare-liger", "sft"), **made, micro=2, **beside),
        _ours("nf4/finetune", 60, "large", **made, base=NF4, adapter=speed.LORA, micro=2),
        _profile("large", adapter=speed.LORA, train=BF16),
    ]


def _middle(batch: int) -> list[Item]:
    made, saves = {"batch": batch, "steps": 8}, {"every": "8 steps", "keep": {"last": 1}}
    return [
        _ours("middle/finetune, saves", 60, "middle", batch=batch, steps=11, micro=4, checkpoint=saves),
        *_others("middle", 40, ("bare", "trainer"), **made, micro=2),
        *_others("middle", 40, ("bare-liger",), **made, micro=4),
        _profile("middle"),
    ]


def _profile(shape: str, train: dict | None = None, **sections: dict) -> Item:
    sections["train"] = {"batch_size": 2, **(train or {})}
    return Item(f"profile/{shape}", 35, partial(proofs.profile, name=shape, **sections))


def _further(few: int, some: int) -> list[Item]:
    large = {"batch": few, "steps": 7, "adapter": speed.LORA, "train": BF16}
    beside = {"batch": few, "steps": 7, "micro": 2, "is_lora": True, "dtype": "bfloat16"}
    return [
        Item("exact/bf16", 50, partial(proofs.exact, what="bf16", has_package=False, train=BF16)),
        # The others take fused kernels, if Liger is there.
        Item("exact/plain", 50, partial(proofs.exact, what="plain", has_package=False, train={"kernels": "plain"})),
        Item("exact/compiled", 90, partial(proofs.exact, what="compiled", has_package=False, train={"compile": True})),
        _ours("small/finetune, fast", 30, "small", batch=some, steps=12, train={"reproducibility": "fast"}),
        _ours("middle/finetune, bf16", 45, "middle", batch=some, steps=8, micro=4, train=BF16),
        _ours("large/finetune, bf16, auto", 50, "large", **large),
        _ours("nf4/finetune, bf16", 60, "large", **large, base=NF4, micro=2),
        *_others("large", 45, ("trainer",), **beside),
    ]


def _ours(name: str, seconds: float, shape: str, *, micro: int = 0, **settings: object) -> Item:
    """A training of ours; `micro` is how many full rows go together, without it `auto` decides."""

    def do(host: Host) -> dict:
        sections = dict(settings)
        if sections.get("base") and find_spec("bitsandbytes") is None:
            return {"ok": None, "why": "bitsandbytes is not installed"}
        train = sections.get("train", {})
        if micro:
            sections["train"] = train | {"micro_batch_tokens": micro * host.workshop.length}
        found = speed.ours(host, shape, limit=4 * seconds, **sections)
        return found | {"is_bf16": train.get("weights") == "bf16"}

    return Item(name, seconds, do)


def _others(shape: str, seconds: float, kinds: tuple[str, ...], **settings: object) -> list[Item]:
    return [
        Item(f"{shape}/{kind}", seconds, partial(speed.contender, kind=kind, name=shape, **settings)) for kind in kinds
    ]


def main() -> None:
    options = _options()
    host = Host(options.out, options.work, options.seconds, options.tiny)
    found = report.load(options.out / "report.json", options.tiny)
    chosen = [item for item in items(options.tiny) if _is_chosen(item.name, options.items)]
    if not chosen:
        raise SystemExit(f"there is no item called {' or '.join(options.items)}")
    left = [item for item in chosen if options.again or item.name not in found]
    while left and host.left > (0 if options.tiny else left[0].seconds):
        item = left[0]
        print(f"{item.name} … ", end="", flush=True)
        try:
            found[item.name] = item.do(host)
        except OutOfTime:
            print("no time left", flush=True)
            break
        except (Failed, OSError, ValueError, KeyError) as error:
            found[item.name] = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        left.pop(0)
        print({True: "good", False: "FAILED", None: "left out"}[found[item.name]["ok"]], flush=True)
        report.write(options.out, found, options.tiny)
    failed = [item.name for item in chosen if found.get(item.name, {}).get("ok") is False]
    print(f"{options.out / 'page.md'}: {len(chosen) - len(left)} of {len(chosen)} items done")
    for text, names in (("failed", failed), ("left for another call", [item.name for item in left])):
        if names:
            print(f"{text}: {', '.join(names)}")
    sys.exit(1 if failed or left else 0)


def _is_chosen(name: str, asked: list[str]) -> bool:
    return not asked or any(name == each or name.startswith(f"{each}/") for each in asked)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", nargs="*", metavar="ITEM")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "finetune-accept")
    parser.add_argument("--seconds", type=float, default=570, help="this call takes no longer")
    parser.add_argument("--again", action="store_true", help="also what was done already")
    parser.add_argument("--tiny", action="store_true", help="tiny models: whether it runs, on any device")
    options = parser.parse_args()
    options.out, options.work = options.out.absolute(), options.work.absolute()
    return options


if __name__ == "__main__":
    main()
