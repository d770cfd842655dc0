"""The weights of a model by kind of module, as `plan` lists them."""

import pytest
import torch

from finetune.model import adapters, kinds
from finetune.model.base import empty_model
from finetune.plan import kinds as listed
from finetune.recipe.load import load
from finetune.recipe.schema import LoraAdapter
from finetune.training.preview import preview
from finetune.training.resolve import resolve


def total(found, name):
    return sum(one[name] for one in found.values())


def test_each_parameter_is_of_one_kind_and_tied_ones_count_once(tiny_base):
    model = empty_model(tiny_base)
    found = kinds.by_kind(model)
    assert total(found, "parameters") == total(found, "trained") == sum(each.numel() for each in model.parameters())
    assert set(found) == {"embeddings", "attention", "mlp", "norms"}
    linear = [module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert total(found, "linear") == sum(linear) - found["embeddings"]["parameters"]  # the tied head


def test_what_is_under_an_adapter_is_not_trained_itself(tiny_base):
    model = adapters.apply(empty_model(tiny_base), LoraAdapter(name="lora", rank=2, targets=["q_proj"]))
    found = kinds.by_kind(model)
    queries = sum(each.numel() for name, each in model.named_parameters() if "q_proj.base_layer.weight" in name)
    assert found["attention"]["under_adapter"] == queries == total(found, "under_adapter")
    assert total(found, "trained") == 0
    assert kinds.missed(found).startswith("the adapter reaches ")


@pytest.mark.parametrize(
    ("sections", "widths"),
    [
        ({"adapter": None}, {"mlp": 4, "norms": 4}),
        ({"train": {"steps": 1, "precision": "bf16"}}, {"mlp": 2, "norms": 4}),
        ({"train": {"steps": 1, "precision": "fp32"}}, {"mlp": 4, "norms": 4}),
        ({"train": {"steps": 1, "weights": "bf16"}}, {"mlp": 2, "norms": 2}),
    ],
    ids=["full", "lora", "lora fp32", "lora bf16 weights"],
)
def test_plan_lists_bytes_in_the_types_that_weights_are_trained_in(recipe_file, sections, widths, tmp_path):
    resolved = resolve(load(recipe_file(**{"train": {"steps": 1}} | sections)))
    facts = listed.facts_of(resolved.plan, resolved.kinds)
    assert {kind: facts[kind]["bytes"] // facts[kind]["parameters"] for kind in widths} == widths
    shown = preview(load(recipe_file(**{"train": {"steps": 1}} | sections)), tmp_path / "run", lambda _: None)
    assert shown.facts["weights"] == facts
    assert "kind" in shown.text and f"{facts['mlp']['parameters']:,}" in shown.text


def test_quantized_weights_are_listed_with_their_bytes(recipe_file):
    plan = resolve(load(recipe_file(train={"steps": 1}))).plan
    quantized = load(recipe_file(base={"checkpoint": "x", "quantization": "nf4"}, train={"steps": 1})).recipe
    plan = plan.model_copy(update={"recipe": quantized})
    one = {"parameters": 1000, "trained": 0, "under_adapter": 960, "linear": 960}
    (facts,) = listed.facts_of(plan, {"mlp": one}).values()
    assert (facts["quantized"], facts["bytes"]) == (960, 540 + 40 * 4)
