"""Modules that run on each row of a packed sequence give what rows alone give, forward and backward, and leave nothing behind."""

import pytest
import torch
from transformers import AutoConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from finetune.errors import FinetuneError
from finetune.model import decoder_layers, tiny
from finetune.model.packing import OURS, Packing, without_leaks
from finetune.model.row_by_row import MARK, Apart
from finetune.training.arrangements import compared
from finetune.training.fitting import check_packing

LENGTHS = (40, 8, 8, 24, 33)
CHUNKED = {"attention_chunk_size": 16}
KINDS = [
    ("gpt_oss", {}, ("GptOssAttention",)),
    ("llama4_text", CHUNKED, ("Llama4TextAttention",)),
    ("bloom", {}, ("BloomAttention",)),
    ("mamba2", {}, ("Mamba2Mixer",)),
    ("qwen3_5_text", {}, ("Qwen3_5GatedDeltaNet",)),
    ("stablelm", {}, ("StableLmAttention",)),
]


def config_of(kind, **settings):
    own = AutoConfig.for_model(kind, **settings)
    silent = {name: 0.0 for name, value in own.to_dict().items() if "drop" in name and isinstance(value, float)}
    return AutoConfig.for_model(kind, **settings, **silent)


def rows_of(model):
    count = model.get_input_embeddings().weight.shape[0]
    return list((torch.arange(sum(LENGTHS)) * 7_919 % count).split(LENGTHS))


def packed_inputs(rows):
    bounds = [0, *torch.tensor([len(row) for row in rows]).cumsum(0).tolist()]
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "row_bounds": bounds,
        "cu_seq_lens": torch.tensor(bounds, dtype=torch.int32),
    }


def packing_model(kind, settings=None):
    """A small model of a kind as packing runs it, and how it does."""
    config = config_of(kind, **(settings or {}))
    packing = Packing(*compared(config, 64)["packing"])
    options = {"attn_implementation": packing.attention} if packing.attention else {}
    model = tiny.model_like(config, 64, **options)
    packing.apply(model)
    return model, packing


def gradients(model, loss):
    parameters = [each for each in model.parameters() if each.requires_grad]
    return torch.autograd.grad(loss, parameters, allow_unused=True)


@pytest.mark.parametrize(
    ("kind", "settings", "classes"), KINDS, ids=lambda value: value if isinstance(value, str) else None
)
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_packed_rows_have_the_logits_and_gradients_of_rows_alone(kind, settings, classes, is_checkpointed):
    model, packing = packing_model(kind, settings)
    assert packing.by_row == classes
    plain = tiny.model_like(config_of(kind, **settings), 64)
    rows = rows_of(plain)
    weights = torch.randn(
        sum(LENGTHS), plain.config.get_text_config().vocab_size, generator=torch.Generator().manual_seed(0)
    )
    alone = torch.cat([plain(input_ids=row[None], use_cache=False).logits[0] for row in rows])
    if is_checkpointed:
        decoder_layers.checkpoint_activations(model.train())
    together = model(**packed_inputs(rows), use_cache=False).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    for one, two in zip(
        gradients(model, (together * weights).sum()), gradients(plain, (alone * weights).sum()), strict=True
    ):
        assert (one is None) == (two is None)
        if one is not None:
            assert (one - two).norm() <= 1e-3 * two.norm() + 1e-4


def test_a_mask_is_as_long_as_the_longest_row():
    model, _ = packing_model("gpt_oss")
    rows, seen = rows_of(model), set()
    for module in model.modules():
        if hasattr(module, MARK):
            run = module.forward
            module.forward = lambda *given, run=run, **named: (
                seen.add(named["attention_mask"].shape[2:]) or run(*given, **named)
            )
    model(**packed_inputs(rows), use_cache=False)
    assert seen == {(40, 40)}


@pytest.mark.parametrize("kind", ["gpt_oss", "mamba2"])
def test_a_run_leaves_nothing_behind_even_if_it_fails(kind):
    model, _ = packing_model(kind)
    rows, masks = rows_of(model), dict(ALL_MASK_ATTENTION_FUNCTIONS)
    before = model(input_ids=rows[0][None], use_cache=False).logits
    with pytest.raises(IndexError):
        model(**packed_inputs([*rows[:-1], rows[-1] + 10**6]), use_cache=False)
    assert dict(ALL_MASK_ATTENTION_FUNCTIONS) == masks
    # without bounds, a sequence is a row
    assert torch.equal(model(input_ids=rows[0][None], use_cache=False).logits, before)
    assert model(**packed_inputs(rows), use_cache=False).logits.isfinite().all()
    assert dict(ALL_MASK_ATTENTION_FUNCTIONS) == masks


def test_one_row_alone_is_run_as_it_is():
    model, _ = packing_model("gpt_oss")
    row = rows_of(model)[0]
    alone, packed = model(input_ids=row[None], use_cache=False), model(**packed_inputs([row]), use_cache=False)
    torch.testing.assert_close(packed.logits, alone.logits)


@pytest.mark.slow
def test_what_differs_in_width_from_row_to_row_goes_to_the_next_module_apart():
    model, packing = packing_model("glm_moe_dsa")
    assert packing.by_row == ("GlmMoeDsaAttention",)
    given = []
    for module in model.modules():
        if hasattr(module, MARK):
            module.register_forward_hook(lambda _, __, output: given.extend(output))
    model(**packed_inputs(rows_of(model)), use_cache=False)
    assert any(isinstance(each, Apart) for each in given)


@pytest.mark.parametrize(
    "packing", [Packing(None), Packing(None, ("GptOssMLP",)), Packing(None, ("GptOssDecoderLayers",))]
)
def test_a_model_that_mixes_rows_is_refused_on_the_spot(packing):
    model = tiny.model_like(config_of("gpt_oss"), 64)
    packing.apply(model)
    with pytest.raises(FinetuneError) as caught:
        check_packing(model, 64, packing)
    assert "hint: set task.packing: false" in str(caught.value)


def test_a_leak_that_no_module_causes_is_not_packed():
    config = config_of("llama")

    def leaking():
        model = tiny.model_like(config, 64, attn_implementation=OURS.attention)
        # as rows mix where the model itself adds something up
        forward = model.forward
        model.forward = lambda **inputs: _with_sum(forward(**inputs))
        return model

    def _with_sum(output):
        output.logits = output.logits + output.logits.sum(dim=1, keepdim=True)
        return output

    assert without_leaks(leaking, OURS, packed_inputs(rows_of(leaking()))) is None


def test_what_runs_by_row_is_not_compiled(monkeypatch):
    model, _ = packing_model("qwen3_5_text")
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(type(self).__name__))
    monkeypatch.setattr(decoder_layers, "check_compiler", lambda: None)
    decoder_layers.compile_layers(model)
    assert compiled and "Qwen3_5GatedDeltaNet" not in compiled
