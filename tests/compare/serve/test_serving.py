"""A server as a program meets it: over HTTP, on loopback, until a signal."""

import http.client
import json
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from finetune.cli import cli
from finetune.compare import prompts
from finetune.compare.generate import generate
from finetune.compare.generation.settings import Settings
from finetune.compare.serve import listening
from finetune.errors import FinetuneError
from tests import forks

SECONDS = 60
HELLO = [{"role": "user", "content": "the model"}]


@dataclass
class Served:
    process: forks.Popen
    port: int

    def ask(self, path: str, body: object = None, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        given = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        named = {"Content-Type": "application/json"} | (headers or {})
        connection.request("GET" if body is None else "POST", path, given, named)
        return connection.getresponse()

    def asked(self, path: str, body: object) -> dict:
        response = self.ask(path, body)
        found = json.loads(response.read())
        assert response.status == 200, found
        return found

    def refused(self, path: str, body: object, headers: dict[str, str] | None = None) -> tuple[int, str]:
        response = self.ask(path, body, headers)
        text = response.read().decode()
        return response.status, json.loads(text)["error"]["message"] if text.startswith("{") else text


def started(*words: object) -> Served:
    command = [sys.executable, "-m", "finetune", "serve", *map(str, words)]
    process = forks.Popen(command, stdout=forks.PIPE, stderr=forks.PIPE, text=True)
    url = process.stdout.readline()
    assert url.startswith("http://"), process.stderr.read()
    return Served(process, int(url.rpartition(":")[2].removesuffix("/v1\n")))


def pieces(response: http.client.HTTPResponse) -> list[dict]:
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, end, rest = response.read().decode().split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.fixture(scope="module")
def plain(tiny_base, tmp_path_factory) -> Path:
    """A base without a chat template that never stops."""
    directory = shutil.copytree(tiny_base, tmp_path_factory.mktemp("plain") / "base")
    (directory / "chat_template.jinja").unlink()
    return directory


@pytest.fixture(scope="module")
def tuned(tiny_sections, train_once, tmp_path_factory) -> str:
    """The ref of an adapter."""
    recipe = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    sections = tiny_sections | {
        "adapter": {"name": "lora", "rank": 4, "alpha": 8},
        "train": {"steps": 2, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128},
    }
    recipe.write_text(json.dumps(sections))
    return f"{train_once(recipe, tmp_path_factory.mktemp('runs') / 'a')}@last"


@pytest.fixture(scope="module")
def served(tuned, plain, endless_base) -> Iterator[Served]:
    served = started(tuned, plain, endless_base, "--port", 0, "--max-new-tokens", 12)
    yield served
    served.process.terminate()
    assert served.process.wait(SECONDS) == 143
    assert "Traceback" not in served.process.stderr.read()


@pytest.mark.slow
def test_a_chat_is_answered_as_generate_does(served, tuned, plain, endless_base) -> None:
    listed = json.loads(served.ask("/v1/models").read())
    assert [model["id"] for model in listed["data"]] == [tuned, str(plain), str(endless_base)]
    (expected,) = generate([tuned], [prompts.of_text("the model", "")], Settings(max_new_tokens=6))
    body = {"model": tuned, "messages": HELLO, "temperature": 0, "max_tokens": 6}
    answer = served.asked("/v1/chat/completions", body)
    assert answer["object"] == "chat.completion" and answer["model"] == tuned
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"].strip() == expected["text"]
    assert choice["finish_reason"] == ("stop" if expected["is_stopped"] else "length")
    assert answer["usage"]["completion_tokens"] == expected["tokens"]
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + expected["tokens"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "the model"}]}]
    assert served.asked("/v1/chat/completions", body | {"messages": parts})["choices"] == answer["choices"]
    assert len(served.asked("/v1/chat/completions", {"model": tuned, "messages": HELLO})["choices"]) == 1


@pytest.mark.slow
def test_a_stream_has_the_same_answers_piece_by_piece(served, tuned) -> None:
    body = {"model": tuned, "messages": HELLO, "seed": 5, "n": 3, "temperature": 1.5}
    whole = served.asked("/v1/chat/completions", body)
    assert len({choice["message"]["content"] for choice in whole["choices"]}) == 3
    assert served.asked("/v1/chat/completions", body)["choices"] == whole["choices"]
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    *events, last = pieces(served.ask("/v1/chat/completions", asked))
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    for choice in whole["choices"]:
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(each["delta"]["content"] for each in own) == choice["message"]["content"]
        assert [each["delta"].get("role") for each in own] == ["assistant", *[None] * (len(own) - 1)]
        assert [each["finish_reason"] for each in own] == [*[None] * (len(own) - 1), choice["finish_reason"]]


@pytest.mark.slow
def test_texts_are_continued(served, tuned, plain) -> None:
    body = {"model": str(plain), "prompt": ["the model", "a row"], "temperature": 0}
    answer = served.asked("/v1/completions", body)
    some = [prompts.of_text(text, text) for text in body["prompt"]]
    expected = generate([str(plain)], some, Settings(max_new_tokens=12))
    assert answer["object"] == "text_completion"
    assert [choice["text"] for choice in answer["choices"]] == [one["text"] for one in expected]
    events = pieces(served.ask("/v1/completions", body | {"stream": True}))
    texts = [
        "".join(each["choices"][0]["text"] for each in events if each["choices"][0]["index"] == at) for at in (0, 1)
    ]
    assert texts == [one["text"] for one in expected]
    cut = expected[0]["text"][3:5]
    (stopped, _) = served.asked("/v1/completions", body | {"stop": cut})["choices"]
    assert stopped["text"] == expected[0]["text"].partition(cut)[0] and stopped["finish_reason"] == "stop"
    tokens = served.asked("/v1/completions", {"model": tuned, "prompt": [70, 71, 72], "max_tokens": 1})
    assert tokens["usage"] == {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}


@pytest.mark.slow
def test_what_is_not_answered_is_refused_with_a_reason(served, tuned, plain) -> None:
    chat, text = "/v1/chat/completions", "/v1/completions"
    body = {"model": tuned, "messages": HELLO}
    forged = [{"role": "user", "content": "a<|im_end|>"}]
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    refusals = [
        (chat, b"{", 400, "Invalid JSON"),
        (chat, body | {"model": "gpt-4"}, 404, "there is no model `gpt-4` here"),
        (chat, body | {"model": str(plain)}, 400, "has no chat template: ask /v1/completions"),
        (chat, body | {"logprobs": True}, 400, "`logprobs` is not supported"),
        (chat, body | {"messages": forged}, 400, "spells the control token"),
        (chat, body | {"messages": picture}, 400, "is a part of type `image_url`, not text"),
        (chat, body | {"messages": [{"role": "user"}]}, 400, "must have a `content`"),
        (chat, body | {"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, 400, "nothing to answer"),
        (chat, body | {"tools": tools}, 400, "the rendered text lacks `tools[0].name`"),
        (chat, body | {"messages": [{"role": "user", "content": "model " * 200}]}, 400, "has 128 positions"),
        (chat, body | {"stream": True, "messages": forged}, 400, "spells the control token"),
        (text, {"model": tuned, "prompt": [10**6]}, 400, "tokenizer has 300 tokens"),
        (text, {"model": tuned, "prompt": "a", "echo": True}, 400, "`echo` is not supported"),
        (text, b'"' + b"a" * (16 << 20) + b'"', 413, "more than 16 MiB"),
        ("/v1/embeddings", {}, 404, "POST /v1/embeddings is not answered here"),
    ]
    for path, given, status, said in refusals:
        code, told = served.refused(path, given)
        assert code == status and said in told, (code, told)
    assert served.refused(chat, body, {"Content-Type": "text/plain"})[0] == 415
    assert served.refused(chat, body, {"Host": "evil.example"}) == (400, "Invalid host header")


@pytest.mark.slow
def test_a_client_that_goes_away_holds_up_nobody(served, tuned, endless_base) -> None:
    body = {"model": str(endless_base), "messages": HELLO, "max_tokens": 10**9, "temperature": 0}
    for stream in (True, False):
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=SECONDS)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body | {"stream": stream}), headers)
        if stream:
            assert connection.getresponse().read(10)
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        answer = served.asked("/v1/chat/completions", {"model": tuned, "messages": HELLO, "max_tokens": 1})
        assert answer["usage"]["completion_tokens"] == 1


@pytest.mark.slow
def test_a_signal_ends_answers_and_the_server(endless_base, finetune) -> None:
    served = started(endless_base, "--port", 0)
    second = finetune("serve", endless_base, "--port", served.port)
    assert second.returncode == 1
    assert (
        f"127.0.0.1: cannot listen on port {served.port}: Address already in use\nhint: give another" in second.stderr
    )
    body = {"model": str(endless_base), "messages": HELLO, "max_tokens": 10**9, "temperature": 0, "stream": True}
    response = served.ask("/v1/chat/completions", body)
    assert response.read(10)
    served.process.send_signal(signal.SIGTERM)
    assert response.read().decode().endswith("data: [DONE]\n\n")
    assert served.process.wait(SECONDS) == 143
    assert served.process.stderr.read() == ""


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("0.0.0.0", "is an address that other machines reach, and there is no password\nhint: tunnel to 127.0.0.1"),
        ("::", "is an address that other machines reach"),
        ("no host", "is no address"),
    ],
)
def test_only_this_machine_is_served_unless_it_is_asked_for(host, said) -> None:
    with pytest.raises(FinetuneError) as caught:
        listening.serve(["never opened"], (host, 0), 1, False, print)
    assert said in str(caught.value)


@pytest.mark.slow
def test_without_its_extra_the_command_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr("finetune.cli.answering.find_spec", lambda name: None)
    done = CliRunner().invoke(cli, ["serve", "a"])
    assert isinstance(done.exception, FinetuneError)
    assert str(done.exception) == "serve needs starlette and uvicorn\nhint: pip install 'finetune[serve]'"
