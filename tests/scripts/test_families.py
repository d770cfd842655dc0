"""Families of the installed transformers are trained as plain transformers would, or refused in one line; and each has its row.

All 285 take four minutes: `scripts/families --few`. Here are those whose way of mixing rows no other one shares, and a few of the rest.
"""

import importlib.util
import re
import sys
import zlib
from pathlib import Path

import pytest

from tests.lengths import length

ROOT = Path(__file__).parents[2]


def script():
    spec = importlib.util.spec_from_file_location("families", ROOT / "scripts/families.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["families"] = module
    spec.loader.exec_module(module)
    return module


def test_the_table_of_models_lists_every_causal_type():
    rows = re.findall(r"^\| `([\w.-]+)` \|", (ROOT / "docs/models.md").read_text(), re.MULTILINE)
    assert rows == list(script().TYPES)


def test_the_page_is_made_of_the_outcomes():
    families = script()
    way = families.Outcome("lora", "packed", "fp32", "trained", "padded")
    found = {
        "good": [way, way._replace(method="full")],
        "bad": [way._replace(method="", state="refused", told="a | b")],
    }
    lines = families.page(found, "5.0", has_packages=False).splitlines()
    assert "| `good` | padded | yes | yes | 2 of 2 | |" in lines
    assert "| `bad` | - | - | - | 0 of 1 | a \\| b |" in lines


@pytest.mark.slow
def test_some_families_are_trained_in_every_way_with_the_losses_of_plain_transformers(tmp_path):
    families = script()
    found = dict(families.combinations(["gptj", "mamba"], tmp_path))
    assert {each.state for outcomes in found.values() for each in outcomes} == {"trained"}
    assert {each.told for outcomes in found.values() for each in outcomes} == {"packed", "padded"}


OF_THEIR_OWN_KIND = (
    *(
        "bamba",
        "bloom",
        "deepseek_v4",
        "falcon_h1",
        "gemma3",
        "gemma4",
        "glm_moe_dsa",
        "gpt_oss",
        "jamba",
        "kimi_linear",
    ),
    *(
        "lfm2",
        "llama4",
        "mamba2",
        "mistral3",
        "mpt",
        "nemotron_h",
        "qwen2_5_vl",
        "qwen3_5",
        "qwen3_next",
        "smolvlm",
        "t5gemma2",
    ),
)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_families_are_trained_as_plain_transformers_would_or_refused_in_one_line(tmp_path):
    families = script()
    assert set(OF_THEIR_OWN_KIND) <= set(families.TYPES)
    kinds = [
        kind for kind in families.TYPES if kind in OF_THEIR_OWN_KIND or zlib.crc32(kind.encode()) % length(12, 1) == 0
    ]
    trained = 0
    for kind, outcomes in families.combinations(kinds, tmp_path, ways=families.FEW_WAYS):
        wrong = [each for each in outcomes if each.state == "wrong"]
        assert not wrong, f"{kind}: {wrong}"
        assert all("\n" not in each.told for each in outcomes)
        trained += any(each.state == "trained" for each in outcomes)
    assert trained >= length(30, 200)
