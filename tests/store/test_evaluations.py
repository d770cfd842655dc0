"""The record of an evaluation: what is written is read, and what is damaged is not taken."""

import numpy as np

from finetune.store import evaluations
from finetune.store.evaluations import Evaluation


def _evaluation(**others) -> Evaluation:
    about = {
        "schema": 1,
        "ref": "runs/a@5",
        "model": "blake3:aa",
        "data": "blake3:bb",
        "set": "held-out",
        "task": "chat",
        "settings": {"precision": "bf16"},
        "measures": {"loss": {"per": "tokens", "better": "lower"}},
        "metrics": {"loss": float("nan")},
        "created": "2026-11-30T10:00:00+00:00",
        "seconds": 1.5,
    }
    numbers = np.arange(3)
    columns = {"loss": np.array([0.1, np.nan, np.inf])}
    return Evaluation(about, numbers.astype(np.uint64) << np.uint64(61), numbers, numbers + 1, columns, **others)


def test_an_evaluation_is_read_as_it_was_written(tmp_path):
    made = _evaluation(answers=["a", "", "ü\x00"], others={"source": ["x", "x", "y"]})
    path = evaluations.write(tmp_path / "new", made)
    found = evaluations.find(tmp_path / "new", "blake3:bb", "blake3:aa", {"precision": "bf16"})
    assert found and path.stem == found.key
    assert found.about == {**made.about, "metrics": {"loss": "nan"}}
    for name in ("contents", "rows", "tokens"):
        assert getattr(found, name).dtype == getattr(made, name).dtype
        assert (getattr(found, name) == getattr(made, name)).all()
    assert np.array_equal(found.columns["loss"], made.columns["loss"], equal_nan=True)
    assert (found.answers, found.others) == (made.answers, made.others)


def test_an_evaluation_of_other_rows_models_or_settings_is_another_one(tmp_path):
    evaluations.write(tmp_path, _evaluation())
    assert evaluations.find(tmp_path, "blake3:cc", "blake3:aa", {"precision": "bf16"}) is None
    assert evaluations.find(tmp_path, "blake3:bb", "blake3:cc", {"precision": "bf16"}) is None
    assert evaluations.find(tmp_path, "blake3:bb", "blake3:aa", {}) is None


def test_a_damaged_evaluation_is_made_again(tmp_path):
    path = evaluations.write(tmp_path, _evaluation())
    whole = path.read_bytes()
    for damaged in (whole[:-9], b"", b"PAR1" + whole[99:], whole[:4] + whole[40:]):
        path.write_bytes(damaged)
        assert evaluations.read(path) is None
    for place in range(4, len(whole) // 2, 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        found = evaluations.read(path)
        assert found is None or np.array_equal(found.columns["loss"], _evaluation().columns["loss"], equal_nan=True)
    path.write_bytes(b"PAR1")
    assert evaluations.read_all(tmp_path) == []


def test_a_newer_versions_evaluation_is_made_again(tmp_path):
    newer = _evaluation()
    newer.about["schema"] = evaluations.SCHEMA + 1
    assert evaluations.read(evaluations.write(tmp_path, newer)) is None
