"""`scripts/scaling.py`: its sizes are those of real files, and its page has its table."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.store.checkpoints.assembled import shared_out
from finetune.store.checkpoints.manifest import FileRecord, Manifest
from finetune.store.run.row_losses import Columns, ModuleNorms, RowLoss
from finetune.store.tensors import TensorRecord
from scripts import scaling

ROOT = Path(__file__).parents[2]
FILES = ("model.safetensors", "optimizer.safetensors")
DIGEST = "xxh3-128:" + 32 * "0"


def record(name: str) -> TensorRecord:
    return TensorRecord(f"model.layers.{name}.self_attn.q_proj.weight", "F32", (4096, 4096), DIGEST)


def test_the_size_of_a_manifest_is_that_of_one_with_so_many_tensors() -> None:
    names = [str(number % 80) for number in range(723)]
    moments = [f"{name}.{moment}" for name in names for moment in ("exp_avg", "exp_avg_sq")]
    small = {f"file-{number}.json": FileRecord(1000, "blake3:" + 64 * "0") for number in range(8)}
    large = {
        name: FileRecord(10**12, "blake3:" + 64 * "0", tuple(map(record, tensors)))
        for name, tensors in zip(FILES, (names, moments), strict=True)
    }
    manifest = Manifest(run="a", attempt="b", step=1, parent=None, plan_id="c", files=large | small)
    assert scaling.manifest_bytes(len(names), is_full=True) == pytest.approx(len(manifest.to_bytes()), rel=0.05)
    records = tuple(map(record, names))
    whole = {FILES[0]: replace(large[FILES[0]], tensors=records)}
    divided = {
        f"model-{number:05}-of-00723.safetensors": replace(large[FILES[0]], tensors=(each,))
        for number, each in enumerate(records)
    }
    sizes = [len(replace(manifest, files=files).to_bytes()) for files in (whole, divided)]
    assert scaling.FILE_RECORD_BYTES == pytest.approx((sizes[1] - sizes[0]) / (len(records) - 1), rel=0.05)


@pytest.mark.parametrize(("model", "hosts"), [(1, 8), (1, 32), (2, 32), (2, 100)])
def test_what_a_host_reads_back_is_what_the_ranks_share_out(model: int, hosts: int) -> None:
    """Files of one size, and a disk that all hosts together do not fill."""
    of, rates = scaling.MODELS[model], scaling.Rates(most=1e15)
    size = of.parameters * (scaling.MASTER + scaling.MOMENTS)
    sizes = {str(number): scaling.FILE_BYTES for number in range(math.ceil(size / scaling.FILE_BYTES))}
    shares = shared_out(sizes, range(hosts))
    most = max(sum(sizes[name] for name in names) for names in shares.values())
    assert scaling.read_back_seconds(size, of, hosts, rates) == pytest.approx(most / rates.read_back)


@pytest.mark.slow
def test_the_columns_beside_the_journal_take_as_much_as_is_said(tmp_path) -> None:
    chance, steps, rows, modules = random.Random(0), 50, 1024, 34
    columns = Columns()
    for step in range(1, steps + 1):
        examples = chance.sample(range(10**7), rows)
        columns.rows.extend(
            RowLoss(step, each, each, chance.gauss(1.5, 0.5), chance.randrange(2000)) for each in examples
        )
        columns.modules.append(ModuleNorms(step, {str(number): chance.gauss(1, 0.3) for number in range(modules)}))
    columns.write(tmp_path, "attempt")
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.parquet")) / steps
    assert scaling.step_bytes(rows, modules) - scaling.STEP_BYTES == pytest.approx(written, rel=0.1)


def test_a_line_of_the_journal_takes_as_much_as_is_said() -> None:
    journal = ROOT / "tests/fixtures/run_before_rooms/runs/older/journal.jsonl"
    lines = [line for line in journal.read_bytes().splitlines(keepends=True) if b'"kind": "step"' in line]
    assert scaling.STEP_BYTES == pytest.approx(sum(map(len, lines)) / len(lines), rel=0.15)


def test_without_failures_all_time_after_the_start_is_training() -> None:
    rates = scaling.Rates()
    of = scaling.cost(scaling.MODELS[0], 8, rates)
    share = scaling.share_of_time(8, of, rates, hours=1, seed=0)
    assert share == pytest.approx(1 - of.resumed / 3600)


def test_many_gpus_lose_more_and_shorter_intervals_lose_less() -> None:
    model, rates = scaling.MODELS[0], scaling.Rates()

    def share(gpus: int, rates: scaling.Rates) -> float:
        return sum(scaling.share_of_time(gpus, scaling.cost(model, gpus, rates), rates, 720, seed) for seed in range(9))

    assert share(1024, rates) < share(64, rates)
    assert share(1024, rates) < share(1024, scaling.Rates(interval=300))


def test_the_page_has_the_table_of_the_script() -> None:
    lines = (ROOT / "docs/scaling.md").read_text().splitlines()
    table = scaling.table()
    start = lines.index(table[0])
    assert lines[start : start + len(table)] == table
