"""Answers to a prompt, on whatever machine."""

import torch

from finetune.compare.generate import generate


def test_a_build_of_torch_for_gpus_answers_on_a_machine_without_one(tiny_base, monkeypatch) -> None:
    def named(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", named)
    (answer,) = generate([str(tiny_base)], ["hello"], max_new_tokens=3, temperature=0.0, seed=0)
    assert answer["prompt"] == "hello" and isinstance(answer["text"], str)
