"""Answers of models to prompts: the quickest look at the effect of a training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict, cast

import torch
from transformers import PreTrainedTokenizerBase

from finetune.errors import explained
from finetune.model import base
from finetune.tasks.rendering import Renderer
from finetune.tasks.text import beginning
from finetune.training.opened import open_model, open_tokenizer

if TYPE_CHECKING:
    from transformers._typing import GenerativePreTrainedModel


class Answer(TypedDict):
    ref: str
    prompt: str
    text: str


def generate(
    texts: Sequence[str], prompts: Sequence[str], max_new_tokens: int, temperature: float, seed: int
) -> list[Answer]:
    """One {ref, prompt, text} for each ref and prompt; temperature 0 takes the likeliest token each time.

    With a chat template the prompt is a user's message; without one it is the beginning of a text.
    """
    return [
        {"ref": text, "prompt": prompt, "text": answer}
        for text in texts
        for prompt, answer in zip(prompts, _answers(text, prompts, max_new_tokens, temperature, seed), strict=True)
    ]


def _answers(text: str, prompts: Sequence[str], max_new_tokens: int, temperature: float, seed: int) -> list[str]:
    # ask whether a device is there: a build of torch for GPUs names its kind of device on any machine
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    # in fp32 a model of 14 billion parameters would take most of a large GPU
    opened = open_model(text, device=device, dtype=None if device.type == "cpu" else torch.bfloat16)
    tokenizer = open_tokenizer(opened)
    model = opened.model
    torch.nn.Module.to(model, device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    # of an adapter's checkpoint, too: its model has the base's generation config
    stops = sorted(
        base.stop_tokens(opened.directory, tokenizer, opened.plan.recipe.task.stop_names if opened.plan else ())
    )
    answers = []
    for prompt in prompts:
        ids = torch.tensor([_ids(tokenizer, prompt, opened.plan.date if opened.plan else None)], device=device)
        torch.manual_seed(seed)
        with torch.inference_mode(), explained("transformers cannot generate with it", text):
            output = cast("GenerativePreTrainedModel", model).generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **sampling,
                max_new_tokens=max_new_tokens,
                use_cache=True,
                eos_token_id=stops or None,
                pad_token_id=tokenizer.eos_token_id,
            )
        answers.append(str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip())
    return answers


def _ids(tokenizer: PreTrainedTokenizerBase, prompt: str, date: str | None) -> list[int]:
    """The tokens before an answer, the same as in training."""
    if not isinstance(tokenizer.chat_template, str):
        return beginning(tokenizer, prompt)
    question = [{"role": "user", "content": prompt}]
    text = Renderer(tokenizer, tokenizer.chat_template, date).text(question, "the prompt", with_header=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
