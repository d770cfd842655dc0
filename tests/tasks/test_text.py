"""Every token of a text is predicted exactly once, however short the examples."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from finetune.data.shapes import tokens
from finetune.errors import DataError
from finetune.recipe.schema import TextTask
from finetune.tasks.text import _divided, beginning, encoder


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


def framed(tokenizer, before: str, after: str):
    """A tokenizer that writes control tokens around every text, as those of Llama 3, GLM 4 and T5 do."""
    tokenizer = copy.deepcopy(tokenizer)
    names = {*before.split(), *after.split()}
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in sorted(names)]
    single = f"{before} $A {after}".strip()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("<|endoftext|>", ""),
        ("<|endoftext|> <|im_start|>", ""),
        ("<|endoftext|>", "<|im_end|>"),
        ("", "<|im_end|>"),
        ("<|im_end|>", "<|im_end|>"),
    ],
)
def test_a_text_that_was_rendered_before_begins_and_ends_once(tiny_tokenizer, before, after):
    tokenizer = framed(tiny_tokenizer, before, after)
    [plain] = encoded(tokenizer, "the row")
    [rendered] = encoded(tokenizer, before.replace(" ", "") + "the row" + after)
    assert rendered.tokens.tolist() == plain.tokens.tolist()
    assert tokenizer.decode(plain.tokens) == before.replace(" ", "") + "the row<|im_end|>"
    [twice] = encoded(tokenizer, 2 * before.replace(" ", "") + "the row")
    assert tokenizer.decode(twice.tokens) == 2 * before.replace(" ", "") + "the row<|im_end|>", "what a text says stays"


def test_a_run_of_the_first_row_rules_keeps_its_begin_tokens(tiny_tokenizer):
    tokenizer, task = framed(tiny_tokenizer, "<|endoftext|>", ""), TextTask(name="text")
    [[example]] = encoder(tokenizer, task, set(), 1)([{"text": "<|endoftext|>the row"}], ["row"])
    assert tokenizer.decode(example.tokens) == "<|endoftext|><|endoftext|>the row<|im_end|>"


@pytest.mark.parametrize(("before", "after"), [("<|endoftext|>", "<|im_end|>"), ("", "<|im_end|>"), ("", "")])
def test_the_beginning_of_a_text_is_not_ended(tiny_tokenizer, before, after):
    tokenizer = framed(tiny_tokenizer, before, after)
    assert tokenizer.decode(beginning(tokenizer, "the row")) == f"{before}the row"
    assert tokenizer.decode(beginning(tokenizer, f"{before}the row<|im_end|> it")) == f"{before}the row<|im_end|> it"


def tokens_encoded(tokenizer, row, max_length=1024):
    """The examples of a row of tokens, read as a source reads it."""
    shaped = tokens.SHAPE.canonical(row, "data.jsonl:1")
    [examples] = encoder(tokenizer, TextTask(name="text", max_length=max_length), set())([shaped], ["data.jsonl:1"])
    return [(example.tokens.tolist(), example.supervised.tolist()) for example in examples]


def test_rows_of_tokens_are_taken_as_they_are_with_their_own_mask(tiny_tokenizer):
    ids = tiny_tokenizer("the row")["input_ids"]
    assert tokens_encoded(tiny_tokenizer, {"input_ids": ids}) == [(ids, [True] * len(ids))]
    mask = [number % 2 for number in range(len(ids))]
    labels = [token if learnt else -100 for token, learnt in zip(ids, mask, strict=True)]
    expected = [(ids, list(map(bool, mask)))]
    assert tokens_encoded(tiny_tokenizer, {"input_ids": ids, "labels": labels}) == expected
    assert tokens_encoded(tiny_tokenizer, {"input_ids": ids, "loss_mask": mask}) == expected


def test_a_long_row_of_tokens_is_divided_and_keeps_its_mask(tiny_tokenizer):
    ids, mask = list(range(3, 12)), [0, 1, 1, 0, 1, 0, 0, 1, 1]
    found = tokens_encoded(tiny_tokenizer, {"input_ids": ids, "loss_mask": mask}, max_length=4)
    predicted = [pair for some in found for pair in list(zip(*some, strict=True))[1:]]
    assert predicted == list(zip(ids, map(bool, mask), strict=True))[1:]


def test_texts_and_tokens_of_one_call_stay_in_their_order(tiny_tokenizer):
    rows = [{"text": "a"}, {"input_ids": [5, 6]}, {"text": "bc"}]
    found = encoder(tiny_tokenizer, TextTask(name="text"), set())(rows, ["1", "2", "3"])
    alone = [encoded(tiny_tokenizer, "a"), None, encoded(tiny_tokenizer, "bc")]
    assert found[1][0].tokens.tolist() == [5, 6]
    assert all(found[n][0].tokens.tolist() == alone[n][0].tokens.tolist() for n in (0, 2))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [5, 10**6]}, "`input_ids[1]` is 1000000, and the base's tokenizer has "),
        ({"input_ids": [5, -1]}, "`input_ids[1]` is -1, not a whole number from 0 to 2147483647"),
        ({"input_ids": [5, 6.0]}, "`input_ids[1]` is a number, not a whole number"),
        ({"input_ids": []}, "`input_ids` is an empty list"),
        ({"input_ids": "5 6"}, "`input_ids` must be a list of whole numbers, not text"),
        ({"input_ids": None}, "does not fit the format `tokens`: `input_ids` is null; its columns are: input_ids"),
        ({"input_ids": [5, 6], "labels": [5]}, "`labels` has 1 items, and `input_ids` has 2"),
        ({"input_ids": [5, 6], "attention_mask": [1]}, "`attention_mask` has 1 items, and `input_ids` has 2"),
        (
            {"input_ids": [5, 6], "labels": [6, -100]},
            "`labels[0]` is 6, and the token there is 5\nhint: a label is the token",
        ),
        ({"input_ids": [5, 6], "labels": [-100, -100]}, "has no token with a loss: all are masked"),
        ({"input_ids": [5, 6], "labels": [5, -100]}, "has no token with a loss: all are masked"),
        ({"input_ids": [5], "labels": [5]}, "has no token with a loss"),
        ({"input_ids": [5, 6], "loss_mask": [1, 2]}, "`loss_mask[1]` is 2, not a whole number from 0 to 1"),
        ({"input_ids": [5, 6], "loss_mask": [1, 1], "labels": [5, 6]}, "has `loss_mask` and `labels`: each says which"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, "`attention_mask` hides tokens within the row"),
        ({"input_ids": [5, 6, 7], "attention_mask": [0, 0, 0]}, "`attention_mask` hides all tokens"),
        ({"input_ids": [5, 6], "text": "a"}, "has a column `text` beside `input_ids`"),
    ],
)
def test_tokens_that_cannot_be_learnt_are_refused_by_name(tiny_tokenizer, row, message):
    with pytest.raises(DataError) as caught:
        tokens_encoded(tiny_tokenizer, row)
    assert str(caught.value).startswith(f"data.jsonl:1: {message}")
