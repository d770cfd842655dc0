"""Requests of the OpenAI protocol: what is understood, and what is refused by name."""

import json

import pytest
from pydantic import ValidationError

from finetune.compare.serve.protocol import ChatRequest, CompletionRequest, Refused, Request, explained

ASKED = {"model": "a", "messages": [{"role": "user", "content": "hi"}]}


def refused(kind: type[Request], body: dict | bytes) -> Refused:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(body if isinstance(body, bytes) else json.dumps(body), strict=True)
    return explained(caught.value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"logprobs": True}, "`logprobs` is not supported"),
        ({"top_logprobs": 3}, "`top_logprobs` is not supported"),
        ({"response_format": {"type": "json_object"}}, "`response_format` is not supported"),
        ({"frequency_penalty": 0.5}, "`frequency_penalty` is not supported"),
        ({"logit_bias": {"5": 1}}, "`logit_bias` is not supported"),
        ({"tool_choice": "required"}, "`tool_choice` is not supported"),
        ({"something_new": 1}, "`something_new` is not supported"),
        ({"n": 0}, "`n`: Input should be greater than or equal to 1"),
        ({"n": 17}, "`n`: Input should be less than or equal to 16"),
        ({"temperature": -1}, "`temperature`: Input should be greater than or equal to 0"),
        ({"temperature": "hot"}, "`temperature`: Input should be a valid number"),
        ({"max_tokens": 1.5}, "`max_tokens`: Input should be a valid integer"),
        ({"max_tokens": 0}, "`max_tokens`: Input should be greater than or equal to 1"),
        ({"top_p": 0}, "`top_p`: Input should be greater than 0"),
        ({"stop": [""]}, "`stop`: "),
        ({"stop": 3}, "`stop`: "),
        ({"messages": []}, "`messages`: List should have at least 1 item"),
        ({"messages": "hi"}, "`messages`: Input should be a valid array"),
        ({"messages": ["hi"]}, "`messages`: Input should be an object"),
        ({"stream": "yes"}, "`stream`: Input should be a valid boolean"),
    ],
)
def test_what_would_not_be_answered_as_asked_is_refused_by_name(changed, said) -> None:
    error = refused(ChatRequest, ASKED | changed)
    assert str(error).startswith(said) and error.status == 400


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b'{"model": "a", "temperature": NaN}', b"\xff", b"[" * 10**5]
)
def test_what_is_not_an_object_of_json_is_refused(body) -> None:
    assert str(refused(ChatRequest, body))


def test_fields_that_ask_for_nothing_are_taken() -> None:
    asks = {"logprobs": False, "n": 1, "user": "me", "tool_choice": "auto", "logit_bias": {}, "presence_penalty": 0}
    asks |= {"response_format": {"type": "text"}, "stop": None, "temperature": 0, "seed": None, "tools": []}
    request = ChatRequest.model_validate_json(json.dumps(ASKED | asks), strict=True)
    settings = request.settings(77)
    assert (settings.max_new_tokens, settings.temperature, settings.stop, settings.samples) == (77, 0.0, (), 1)


def test_the_defaults_are_those_of_the_protocol() -> None:
    request = ChatRequest.model_validate_json(json.dumps(ASKED), strict=True)
    one, other = request.settings(5), request.settings(5)
    assert one.temperature == 1.0 and one.seed != other.seed
    most = ChatRequest.model_validate_json(json.dumps(ASKED | {"max_tokens": 3, "max_completion_tokens": 4}))
    assert most.settings(5).max_new_tokens == 4


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([5, 6], [[5, 6]])],
)
def test_a_completion_has_a_text_or_several_or_tokens(prompt, prompts) -> None:
    request = CompletionRequest.model_validate_json(json.dumps({"model": "a", "prompt": prompt}), strict=True)
    assert request.prompts == prompts
    for bad in ("", [], [""], [[5]], [5, "a"], None):
        assert refused(CompletionRequest, {"model": "a", "prompt": bad}).param == "prompt"
