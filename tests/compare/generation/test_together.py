"""Which questions come together is found on a small model, by its kind."""

import json
import shutil

import pytest
from transformers import AutoConfig

from finetune.compare.generation import together
from finetune.errors import BaseError


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, together.PADDED),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, together.LEVEL),
    ],
    ids=["attention", "rotary frequencies by the longest row"],
)
def test_questions_come_together_where_that_is_exact(tiny_base, tmp_path, changed, found) -> None:
    directory = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changed))
    assert together.together(directory) == found


def test_a_hybrid_whose_convolution_sees_padding_takes_questions_of_one_length() -> None:
    config = AutoConfig.for_model("lfm2")
    assert together._found(config) in (together.LEVEL, together.PADDED)


def test_a_model_that_cannot_be_made_small_answers_one_question_at_a_time(tiny_base, monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise BaseError("cannot be made small")

    monkeypatch.setattr(together.tiny, "model_like", fails)
    assert together._found(AutoConfig.from_pretrained(tiny_base)) == together.ALONE
