"""What only a GPU can show; everything here skips itself where there is none, and was not run before."""

import shutil

import pytest
import torch

from finetune.model import adapters, attention
from finetune.model.attention import per_row
from finetune.recipe.load import load
from finetune.training import build, fitting
from finetune.training.resolve import resolve
from finetune.training.saving.buffers import Staging
from finetune.training.strategy.start import start_accelerator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
BOUNDS = [0, 300, 301, 420, 512]
BF16 = {"train": {"steps": 10, "batch_size": 6, "precision": "bf16", "micro_batch_tokens": 128}}
EXACT = {"train": BF16["train"] | {"reproducibility": "exact"}}


def attended(device, dtype, *, size=64, heads=(8, 2), bounds=BOUNDS, **settings):
    """Output and gradients of packed attention; the same random inputs everywhere, which bf16 holds exactly."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, count, bounds[-1], size, generator=generator).bfloat16().to(device, dtype).requires_grad_()
        for count in (heads[0], heads[1], heads[1])
    ]
    cu_seq_lens = torch.tensor(bounds, dtype=torch.int32, device=device)
    output, _ = per_row(torch.nn.Module(), *inputs, None, row_bounds=bounds, cu_seq_lens=cu_seq_lens, **settings)
    seed = torch.randn(output.shape, generator=generator).bfloat16().to(device, dtype)
    return [tensor.float().cpu() for tensor in (output, *torch.autograd.grad(output, inputs, seed))]


@pytest.mark.parametrize("size", [64, 20])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("settings", [{}, {"scaling": 0.3}, {"sliding_window": 16}])
def test_the_kernel_for_all_rows_equals_attention_row_by_row(size, heads, settings, monkeypatch):
    expected = attended("cpu", torch.float32, size=size, heads=heads, **settings)
    if torch.cuda.get_device_capability() >= attention.KERNEL_CAPABILITY:
        monkeypatch.setattr(attention, "_row_by_row", None)  # only the kernel can answer
    ours = attended("cuda", torch.bfloat16, size=size, heads=heads, **settings)
    for mine, other in zip(ours, expected, strict=True):
        # roundings within the kernel, emulated on a CPU, make 0.0016 to 0.0035
        assert (mine - other).norm() <= 1e-2 * other.norm()


def test_soft_capped_attention_is_the_same_on_the_gpu():
    ours = attended("cuda", torch.float32, softcap=5.0)
    for mine, other in zip(ours, attended("cpu", torch.float32, softcap=5.0), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


def test_a_bf16_run_resumes_to_the_bit(recipe_file, finetune, tmp_path):
    recipe, run = recipe_file(adapter=None, **EXACT), tmp_path / "run"
    assert finetune("train", recipe, "--run", run).returncode == 0
    files = [run / "checkpoints/step-00000010" / name for name in ("model.safetensors", "optimizer.safetensors")]
    contents = [file.read_bytes() for file in files]
    shutil.rmtree(files[0].parent)
    resumed = finetune("train", recipe, "--run", run)
    assert resumed.returncode == 0 and "resumed from step 8" in resumed.stderr, resumed.stderr
    assert [file.read_bytes() for file in files] == contents


@pytest.mark.parametrize("sections", [{}, {"adapter": None}], ids=["lora", "full"])
def test_a_run_with_fused_kernels_resumes_to_the_bit(recipe_file, finetune, tmp_path, sections):
    pytest.importorskip("liger_kernel")
    recipe, run = recipe_file(train=EXACT["train"] | {"kernels": "fused"}, **sections), tmp_path / "run"
    trained = finetune("train", recipe, "--run", run)
    assert trained.returncode == 0 and "kernels are fused" in trained.stderr, trained.stderr
    [weights] = (run / "checkpoints/step-00000010").glob("*model.safetensors")
    content = weights.read_bytes()
    shutil.rmtree(weights.parent)
    assert "resumed from step 8" in finetune("train", recipe, "--run", run).stderr
    assert weights.read_bytes() == content


def test_a_copy_for_a_save_is_whole_and_in_page_locked_memory():
    live = {name: torch.randn(size, device="cuda") for name, size in (("a", 3), ("b", 1_000_001), ("c", 70_000))}
    expected = {name: tensor.cpu() for name, tensor in live.items()}
    copy = Staging().take(live)
    copy.wait()
    for tensor in live.values():
        tensor.zero_()
    assert all(
        torch.equal(copy.tensors[name], each) and copy.tensors[name].is_pinned() for name, each in expected.items()
    )


def test_a_base_beneath_an_adapter_is_made_on_the_device_as_it_stays(recipe_file):
    resolved = resolve(load(recipe_file(**BF16)))
    model = build.trained_model(resolved.plan, resolved.base_directory, torch.device("cuda", 0))
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    expected = build.trained_model(resolved.plan, resolved.base_directory, torch.device("cpu"))
    adapters.store_frozen_as_bf16(expected)
    for (name, ours), (_, other) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert ours.dtype == other.dtype and torch.equal(ours.cpu(), other), name


def test_packing_is_tried_out_with_the_kernel_that_trains(recipe_file, monkeypatch):
    calls, kernel = [], attention._in_one_call
    monkeypatch.setattr(attention, "_in_one_call", lambda *given: calls.append(given) or kernel(*given))
    monkeypatch.setattr(fitting.cache, "found", lambda kind, facts, find: find())
    resolved = resolve(load(recipe_file(**BF16)))
    build.build(resolved.plan, resolved.base_directory, start_accelerator(resolved.plan.recipe.train))
    assert calls


def test_packing_takes_less_memory_than_padding(recipe_file, train, tmp_path):
    peaks = {}
    for is_packed in (True, False):
        torch.cuda.reset_peak_memory_stats()
        task = {"name": "chat", "max_length": 64, "packing": is_packed}
        train(recipe_file(f"packed-{is_packed}", task=task, **BF16), tmp_path / str(is_packed))
        peaks[is_packed] = torch.cuda.max_memory_allocated()
    assert 0 < peaks[True] <= 1.05 * peaks[False]
