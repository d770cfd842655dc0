"""What a package computes does not depend on the day that it is looked at."""

import json
from datetime import datetime
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import chat_template_utils

from finetune.package import probe, proof, reference
from tests.conftest import CHATML

DATED = "{{ 'Today is ' + strftime_now('%d %b %Y, %H:%M:%S') + '\n' }}" + CHATML


class Clock(datetime):
    year_of_today = 2026

    @classmethod
    def now(cls, tz: object = None) -> datetime:
        return datetime(cls.year_of_today, 11, 29)


@pytest.fixture
def dated(tiny_base, monkeypatch):
    """A model and its tokenizer, whose template prints the day; on a clock that can be set."""
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = DATED
    return AutoModelForCausalLM.from_pretrained(tiny_base), tokenizer


def look(dated) -> proof.Look:
    return proof.Look(probe.logits(*dated), probe.facts(*dated))


def test_a_template_that_prints_the_day_gives_the_same_logits_on_every_day(dated, monkeypatch) -> None:
    before = look(dated)
    monkeypatch.setattr(Clock, "year_of_today", 2027)
    after = look(dated)
    assert after.facts["template"] == before.facts["template"]
    assert all(torch.equal(before.logits[name], after.logits[name]) for name in ("batch", "question"))
    told = dated[1].apply_chat_template(probe.QUESTION, tokenize=False)
    assert told.startswith("Today is 29 Nov 2027"), "the clock is left as it was"


def test_a_record_of_older_code_is_held_against_what_does_not_depend_on_the_day(
    dated, tmp_path: Path, monkeypatch
) -> None:
    seen = look(dated)
    monkeypatch.setattr(proof, "load_back", lambda directory, base: seen)
    said = reference.recorded(seen.logits, "F32")
    del said["day"]
    said["sha256"]["question"] = "of another day"
    said["likeliest"]["question"][0]["logits"][0] += 1.0
    (tmp_path / "training").mkdir()

    def findings() -> list:
        (tmp_path / reference.FILE).write_text(json.dumps(said))
        return list(reference.findings(tmp_path))

    assert findings() == []
    said["sha256"]["batch"], said["likeliest"]["batch"][0]["logits"][0] = "other weights", 1e3
    assert ["computes other logits" in each.message for each in findings()] == [True]
