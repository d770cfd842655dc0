"""Every token of a text is predicted exactly once, however short the examples."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from finetune.errors import DataError
from finetune.recipe.schema import TextTask
from finetune.tasks.text import _divided, encoder


def encoded(tokenizer, text, max_length=1024):
    task = TextTask(name="text", max_length=max_length)
    [examples] = encoder(tokenizer, task, {tokenizer.eos_token_id})([{"text": text}], ["data.jsonl:1"])
    return examples


@settings(deadline=None)
@given(st.integers(2, 200), st.integers(2, 50))
def test_a_divided_text_has_every_token_predicted_exactly_once(length, max_length):
    examples = _divided(list(range(length)), max_length)
    predicted = [token for example in examples for token in example.tokens[1:].tolist()]
    assert predicted == list(range(1, length))
    assert all(2 <= len(example.tokens) <= max_length for example in examples)
    assert all(example.supervised.all() and example.cut_tokens == 0 for example in examples)


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80).filter(str.strip), st.integers(2, 30))
def test_the_examples_of_a_text_spell_it_and_its_end(tiny_tokenizer, text, max_length):
    first, *others = encoded(tiny_tokenizer, text, max_length)
    ids = [*first.tokens.tolist(), *(token for example in others for token in example.tokens[1:].tolist())]
    assert ids == [*tiny_tokenizer(text)["input_ids"], tiny_tokenizer.eos_token_id]


def test_a_text_ends_with_the_end_token_once_even_when_the_tokenizer_writes_it(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    end = ("<|im_end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[end]
    )
    [example] = encoded(tokenizer, "the row")
    [plain] = encoded(tiny_tokenizer, "the row")
    assert example.tokens.tolist() == plain.tokens.tolist()
    assert plain.tokens.tolist().count(tokenizer.eos_token_id) == 1


def test_a_base_without_an_end_token_is_refused(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(DataError) as caught:
        encoder(tokenizer, TextTask(name="text"), set())
    assert str(caught.value) == "the base's tokenizer has no end-of-text token\nhint: choose a base that has one"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ""}, "has an empty text\nhint: remove the row"),
        ({"text": " \n"}, "has an empty text\nhint: remove the row"),
        ({}, "has no `text`; its columns are: none\nhint: map a column with data.train[].columns, like {text: body}"),
        ({"text": 3, "body": "a"}, "`text` must be text, not a number"),
        ({"text": None}, "`text` must be text, not null"),
        ({"text": float("nan")}, "`text` must be text, not NaN"),
        ({"text": b"a"}, "`text` must be text, not bytes"),
        ({"text": ["a"]}, "`text` must be text, not a list"),
    ],
)
def test_a_row_without_text_is_named(tiny_tokenizer, row, message):
    encode = encoder(tiny_tokenizer, TextTask(name="text"), {tiny_tokenizer.eos_token_id})
    with pytest.raises(DataError) as caught:
        encode([row], ["data.jsonl:1"])
    assert str(caught.value) == f"data.jsonl:1: {message}"
