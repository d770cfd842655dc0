"""Templates, stop tokens and turns from the recipe to the package: what is learnt is what the model sees when it answers."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from finetune.compare.generation.answerer import open_answerer
from finetune.compare.prompts import of_text, questions_of
from finetune.errors import FinetuneError
from finetune.model import base
from finetune.package.export import package
from finetune.recipe.load import load
from finetune.store.run.directory import RunDirectory
from finetune.training.opened import open_model, open_tokenizer
from finetune.training.resolve import resolve

THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['reasoning_content'] and loop.last %}{{ '<think>' + message['reasoning_content'] + '</think>' }}{% endif %}"
    "{{ message['content'] + '<|endoftext|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if is_quiet %}{{ '<think></think>' }}{% endif %}{% endif %}"
)
STEPS = {"steps": 2, "batch_size": 2, "precision": "fp32", "micro_batch_tokens": 256}


@pytest.fixture
def thinking(recipe_file, tmp_path):
    """A function to a recipe of rows with two turns and thoughts, whose turns end with a token that is not the base's end token."""

    def thinking(**sections):
        (tmp_path / "thinking.jinja").write_text(THINKING)
        turns = [
            {"role": "user", "content": "it was"},
            {"role": "assistant", "content": "said", "reasoning_content": "the model"},
            {"role": "user", "content": "what was"},
            {"role": "assistant", "content": "asked of it", "reasoning_content": "a row"},
        ]
        rows = [
            {"messages": [turn | {"content": f"{turn['content']} {number}"} for turn in turns]} for number in range(4)
        ]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "name": "chat",
            "max_length": 128,
            "template": str(tmp_path / "thinking.jinja"),
            "stop": "<|endoftext|>",
        }
        data = {"train": [{"path": str(tmp_path / "rows.jsonl")}]}
        return recipe_file(**({"task": task, "data": data, "train": STEPS} | sections)), task

    return thinking


def test_one_example_a_turn_has_the_loss_of_that_turn_as_plain_transformers_sees_it(thinking, tiny_base):
    recipe, _ = thinking()
    resolved = resolve(load(recipe))
    assert len(resolved.train) == 8, "two turns a row"
    [note] = resolved.notes
    assert note.startswith(
        "the chat template renders a turn differently once others follow, so 4 rows make 8 examples, one for each learnt turn, with "
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base), resolved.tokenizer
    rows = [json.loads(line) for line in (recipe.parent / "rows.jsonl").read_text().splitlines()]
    for number, example in enumerate(resolved.train[index] for index in range(8)):
        messages = rows[number // 2]["messages"][: 2 if number % 2 == 0 else 4]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        answer = f"<think>{messages[-1]['reasoning_content']}</think>{messages[-1]['content']}<|endoftext|>"
        given, said = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
        ids = torch.tensor([given + said])
        labels = torch.tensor([[-100] * len(given) + said])
        ours = torch.tensor(example.tokens[None, : ids.shape[1]].astype("int64"))
        mask = torch.tensor(example.supervised[: ids.shape[1]])
        assert torch.equal(ours, ids) and not example.supervised[ids.shape[1] :].any()
        with torch.no_grad():
            theirs = model(input_ids=ids, labels=labels).loss
            of_ours = model(input_ids=ours, labels=torch.where(mask, ours, -100)).loss
        assert torch.equal(of_ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("has_adapter", [True, False])
def test_a_named_stop_token_ends_generation_of_checkpoints_packages_and_what_goes_on_from_them(
    thinking, train, tmp_path, recipe_file, has_adapter
):
    sections = {} if has_adapter else {"adapter": None}
    recipe, task = thinking(**sections)
    run = train(recipe, tmp_path / "run")
    checkpoint = RunDirectory(run).checkpoints / "step-00000002"
    stop, end = 0, 2
    assert GenerationConfig.from_pretrained(checkpoint).eos_token_id == [end, stop]
    package(f"{run}@2", tmp_path / "package")
    assert GenerationConfig.from_pretrained(tmp_path / "package").eos_token_id == [end, stop]
    opened = open_model(f"{run}@2")
    assert base.stop_tokens(opened.directory, open_tokenizer(opened), ()) == {end, stop}
    on = {"task": {key: task[key] for key in ("name", "max_length")}, "base": {"checkpoint": f"{run}@2"}}
    assert len(resolve(load(thinking(**(sections | on))[0])).train) == 8, (
        "the checkpoint brings template and stop token"
    )


@pytest.mark.slow
def test_variables_of_a_template_are_in_force_wherever_the_run_answers(thinking, train, tmp_path):
    task = thinking()[1] | {"template_variables": {"is_quiet": True}}
    rows = tmp_path / "quiet.jsonl"
    rows.write_text(json.dumps({"prompt": "it was", "completion": "said"}) + "\n")
    recipe, _ = thinking(task=task, data={"train": [{"path": str(rows)}]})
    run = train(recipe, tmp_path / "run")
    (tmp_path / "thinking.jinja").unlink()
    opened = open_model(f"{run}@2")
    tokenizer = open_tokenizer(opened)
    (question,) = questions_of(open_answerer(f"{run}@2"), [of_text("it was", "")])
    assert tokenizer.decode(question.ids).endswith("<|im_start|>assistant\n<think></think>")
    example = resolve(load(recipe), opened.run_plan).train[0]
    assert tokenizer.decode(example.tokens).endswith("assistant\n<think></think>said<|endoftext|>\n")
    plain = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, tokenize=False
    )
    assert plain.endswith("<think></think>"), "also for those who know no variable"


def test_a_stop_token_that_the_base_does_not_have_is_refused(thinking):
    recipe, task = thinking()
    with pytest.raises(FinetuneError) as caught:
        resolve(load(recipe, ["task.stop=<|eot|>"]))
    assert str(caught.value) == (
        "task.stop: `<|eot|>` is not one token of the base's tokenizer\nhint: its special tokens are `<|im_end|>`, `<|endoftext|>`"
    )
