"""A base quantized during loading or in its files, under LoRA: the losses are those of plain peft and bitsandbytes on the same rows."""

import warnings
from importlib.util import find_spec

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from finetune.plan.row_order import derive
from tests.model.quantizing import in_bits
from tests.training.test_loop import Opened, row_loss

pytestmark = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes")
NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
PLAIN = {"int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True, **NF4}}
LORA = {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.0}


@pytest.mark.parametrize("is_stored", [False, True], ids=["while read", "stored"])
@pytest.mark.parametrize("kind", PLAIN)
def test_three_steps_are_those_of_plain_peft_and_bitsandbytes(kind, is_stored, recipe_file, tiny_base, tmp_path):
    directory = in_bits(tiny_base, tmp_path / "small", kind) if is_stored else tiny_base
    asked = {} if is_stored else {"quantization": kind}
    run = Opened(recipe_file(base={"checkpoint": str(directory), **asked}, adapter=LORA))
    assert run.plan.base.stored == (kind if is_stored else None)
    settings = run.plan.recipe.optimizer
    with warnings.catch_warnings(action="ignore"):
        bits = {} if is_stored else {"quantization_config": BitsAndBytesConfig(**PLAIN[kind])}
        bare = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, device_map="cpu", **bits)
        for parameter in bare.parameters():
            if parameter.is_floating_point():  # of a stored base: transformers leaves them as they are in the files
                parameter.data = parameter.data.float()
        torch.manual_seed(derive(run.plan.recipe.train.seed, "adapter"))
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(bare, config).train()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
    for step in range(1, 4):
        report = run.step()
        losses, counts = zip(*(row_loss(model, run.resolved.train[int(one)]) for one in report.examples), strict=True)
        mean = torch.stack(losses).sum() / sum(counts)
        optimizer.zero_grad()
        mean.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, run.plan.recipe.optimizer.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = run.plan.learning_rate(step)
        optimizer.step()
        assert report.loss == pytest.approx(mean.item(), rel=1e-5)
        assert report.grad_norm == pytest.approx(norm.item(), rel=1e-4)
