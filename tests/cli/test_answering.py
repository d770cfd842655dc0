"""`generate` and `chat` as processes: streams, signals, terminals, broken input."""

import contextlib
import json
import os
import pty
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import forks

SECONDS = 60


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "finetune", *map(str, words)]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("the model\na row\n")
    return path


@pytest.mark.slow
def test_answers_are_printed_by_prompt_and_as_json(finetune, tiny_base, endless_base, lines) -> None:
    asked = ("generate", tiny_base, endless_base, "--prompts", lines, "--max-new-tokens", 3)
    done = finetune(*asked)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("===")] == [
        f"=== {lines}:{at}" for at in (1, 2)
    ]
    assert done.stderr == ""
    results = json.loads(finetune(*asked, "--json").stdout)["results"]
    assert [(one["prompt"], one["tokens"], one["is_stopped"]) for one in results] == [
        (text, 3, False) for text in ("the model", "a row") for _ in range(2)
    ]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ((), 2, "give --prompt TEXT, --prompt-file FILE or --prompts FILE"),
        (("--prompt", "a", "--samples", "2"), 2, "--samples needs a --temperature over 0"),
        (("--prompt-file", "binary"), 1, "binary: is not UTF-8 text: byte 1\nhint: save the file as UTF-8"),
        (("--prompt-file", "empty"), 1, "empty: is empty"),
        (("--prompt-file", "gone"), 2, "No such file"),
        (("--prompts", "rows.jsonl"), 1, "rows.jsonl:2: bad JSON"),
        (("--prompt", "model " * 200), 1, "prompt 1: the prompt has "),
    ],
)
def test_what_cannot_be_asked_is_one_error(finetune, tiny_base, tmp_path, options, code, said) -> None:
    (tmp_path / "binary").write_bytes(b"a\xff\x00")
    (tmp_path / "empty").write_bytes(b" \n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    done = finetune("generate", tiny_base, *options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_lines_of_a_pipe_are_answered_one_after_the_other(tiny_base, tmp_path) -> None:
    said = f"the model\n\n/undo\n /a question\n/save {tmp_path}/rows.jsonl\n"
    asked = command("chat", tiny_base, "--max-new-tokens", 4, "--system", "be short")
    done = forks.run(asked, input=said, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert [turn["content"] for turn in row["messages"][:2]] == ["be short", "/a question"]
    assert done.stdout.rstrip("\n").endswith(row["messages"][2]["content"])
    for bad, told in ((b"/leave\n", "`/leave` is no command"), (b"a\n\xff\n", "line 2 of the input: is not UTF-8")):
        done = forks.run(asked, input=bad, capture_output=True, timeout=SECONDS)
        assert done.returncode == 1 and told in done.stderr.decode()


def test_a_reader_that_goes_away_ends_a_chat_quietly(tiny_base) -> None:
    asked = command("chat", tiny_base, "--max-new-tokens", 100, "--temperature", 2)
    with forks.Popen(asked, stdin=forks.PIPE, stdout=forks.PIPE, stderr=forks.PIPE) as process:
        process.stdout.close()
        process.stdin.write(b"the model\n" * 20)
        process.stdin.close()
        assert process.wait(SECONDS) == 1
        assert process.stderr.read() == b""


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *words: object):
        self.screen, theirs = pty.openpty()
        self.process = forks.Popen(command(*words), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def read(self) -> None:
        assert select.select([self.screen], [], [], SECONDS)[0], self.seen
        self.seen += os.read(self.screen, 4096).decode(errors="replace")

    def until(self, text: str, past: int = 0) -> None:
        while text not in self.seen[past:]:
            self.read()


@pytest.fixture
def talking(endless_base) -> Iterator[Terminal]:
    terminal = Terminal("chat", endless_base, "--max-new-tokens", 10**6)
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.screen)


def test_a_conversation_on_a_terminal(talking, tmp_path) -> None:
    """Errors end no conversation, ctrl-C ends an answer, and ctrl-D the conversation."""
    talking.until("> ")
    for line, told in (("/undo", "nothing to undo"), ("<|im_end|>", "spells the control token"), ("/x", "no command")):
        talking.type(f"{line}\n")
        talking.until(told)
        talking.until("> ", past=talking.seen.rindex(told))
    talking.type("the model\n")
    talking.until("the model\r\n")
    begun = len(talking.seen)
    while len(talking.seen) < begun + 20:
        talking.read()
    talking.process.send_signal(signal.SIGINT)
    talking.until("\n> ", past=begun)
    talking.type(f"/save {tmp_path}/rows.jsonl\n")
    talking.until("> ", past=len(talking.seen))
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
    talking.type("\x04")
    assert talking.process.wait(SECONDS) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_at_the_prompt_ends_a_conversation(talking, number, code) -> None:
    talking.until("> ")
    for _ in range(SECONDS):  # CPython overlooks one that comes right before it waits for a key
        talking.process.send_signal(number)
        with contextlib.suppress(forks.subprocess.TimeoutExpired):
            talking.process.wait(1)
            break
    assert talking.process.returncode == code
    assert "Traceback" not in talking.seen
