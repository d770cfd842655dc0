"""Runs a step under `fsdp` as one of several ranks that are not there, and prints the most bytes that its tensors had at once.

    python gathered_step.py RECIPE WORLD_SIZE TOKENS

The code and the tensors are real, but nothing is exchanged (torch's `fake` process group): what other ranks would send is arbitrary.
"""

import json
import sys
import weakref

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.model import adapters, base, decoder_layers, losses, optimizer
from finetune.recipe.load import load
from finetune.tasks import TASKS
from finetune.training.state import Objective
from finetune.training.strategy import fsdp


class Live(TorchDispatchMode):
    """Bytes of tensors that exist; FSDP frees a tensor by giving it a storage of no bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.peak = 0

    def see(self, tensor: torch.Tensor) -> None:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        self.storages.setdefault(storage._cdata, weakref.ref(storage))

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, result)):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        found = {key: each() for key, each in self.storages.items()}
        self.storages = {key: self.storages[key] for key, storage in found.items() if storage is not None}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in found.values() if storage is not None))
        return result


def main(recipe_file: str, world_size: str, tokens: str) -> None:
    recipe = load(recipe_file).recipe
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=int(world_size))
    config = AutoConfig.from_pretrained(recipe.base.checkpoint)
    model = AutoModelForCausalLM.from_config(config, dtype=base.DTYPES[recipe.train.weights])
    model = adapters.apply(model, recipe.adapter)
    if recipe.train.activation_checkpointing:
        decoder_layers.checkpoint_activations(model, False)
    model.train()
    objective = Objective(model, TASKS[recipe.task.name].loss, losses.chunked)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if recipe.train.precision == "bf16" else "no")
    mesh = init_device_mesh("cpu", (int(world_size),))
    ids = torch.arange(int(tokens))[None] % config.vocab_size
    inputs = {"input_ids": ids}
    batch = {"model_inputs": inputs, "positions_N": torch.arange(ids.numel()), "labels_N": ids[0]}
    prepared, _ = fsdp.prepare_on(mesh, accelerator, objective, lambda: optimizer.build(model, recipe.optimizer, 0))
    live = Live()
    for parameter in model.parameters():
        live.see(parameter)
    with live:
        for _ in range(2):  # in the second micro-batch, gradients are there from the start
            prepared(batch | {"tokens_of_rows": [ids.numel()]})[0].backward()
    print(json.dumps({"peak": live.peak}))


main(*sys.argv[1:])
