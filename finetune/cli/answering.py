"""`generate`, `chat` and `serve`: what models answer, to prompts, to you and to programs."""

import sys
from collections.abc import Callable
from functools import reduce
from importlib.util import find_spec
from typing import BinaryIO, TypedDict, Unpack

import click

from finetune.cli.answer import Answer, answers
from finetune.cli.importing import importing
from finetune.cli.options import REF, REFS, Command, where_it_is
from finetune.errors import DataError, FinetuneError


class Sampling(TypedDict):
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


def how_to_sample(most: int) -> Callable[[Command], Command]:
    """The options of how answers are written, by default of up to `most` tokens."""
    options = (
        click.option(
            "--max-new-tokens", type=click.IntRange(min=1), default=most, show_default=True, help="The longest answer."
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(min=0),
            default=0.0,
            show_default=True,
            help="0 takes the likeliest token each time.",
        ),
        click.option(
            "--top-p",
            type=click.FloatRange(min=0, max=1, min_open=True),
            default=1.0,
            show_default=True,
            help="Sample among the likeliest tokens that together have this probability.",
        ),
        click.option("--seed", default=0, show_default=True, help="Decides the samples if the temperature is not 0."),
    )

    def with_options(command: Command) -> Command:
        return reduce(lambda made, option: option(made), reversed(options), command)

    return with_options


@click.command()
@REFS
@click.option("--prompt", "given", multiple=True, help="A prompt; you may give several.")
@click.option("--prompt-file", type=click.File("rb"), help="A file with one prompt.")
@click.option("--prompts", "path", metavar="FILE", help="A file of prompts: lines of text, or rows of any format.")
@click.option("--samples", type=click.IntRange(min=1), default=1, show_default=True, help="Answers to each prompt.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Answers written at once."
)
@how_to_sample(most=128)
@answers
@where_it_is
def generate(
    refs: tuple[str, ...],
    given: tuple[str, ...],
    prompt_file: BinaryIO | None,
    path: str | None,
    samples: int,
    batch_size: int,
    **sampling: Unpack[Sampling],
) -> Answer:
    """Let models answer your prompts, or continue your texts."""
    if not (given or prompt_file or path):
        raise click.UsageError("give --prompt TEXT, --prompt-file FILE or --prompts FILE")
    if samples > 1 and not sampling["temperature"]:
        raise click.UsageError("--samples needs a --temperature over 0: without one, all samples are the same")
    texts = [*given, *([_whole(prompt_file)] if prompt_file else [])]
    with importing():
        from finetune.compare import prompts, side_by_side
        from finetune.compare.generate import generate as generate_answers
        from finetune.compare.generation.settings import Settings

    asked = [prompts.of_text(text, f"prompt {number}") for number, text in enumerate(texts, start=1)]
    asked += prompts.of_file(path) if path else []
    settings = Settings(**sampling, samples=samples, batch_size=batch_size)
    count = len(asked) * samples * len({*refs})
    with click.progressbar(length=count, file=sys.stderr, hidden=count < 2 or not sys.stderr.isatty()) as bar:
        results = generate_answers(refs, asked, settings, lambda: bar.update(1))
    return Answer({"results": results}, side_by_side.listing(results))


def _whole(file: BinaryIO) -> str:
    """The prompt that a file is."""
    try:
        text = file.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text: byte {error.start:,}"
        raise DataError(message, where=file.name, hint="save the file as UTF-8") from None
    if not text:
        raise DataError("is empty", where=file.name, hint="write the prompt into it")
    return text


@click.command()
@REF
@click.option("--system", help="A system message before the conversation.")
@how_to_sample(most=1024)
@where_it_is
def chat(ref: str, system: str | None, **sampling: Unpack[Sampling]) -> None:
    """Talk to a model in the terminal."""
    with importing():
        from finetune.cli import chat_loop
        from finetune.compare.chat import Chat
        from finetune.compare.generation.answerer import open_answerer
        from finetune.compare.generation.settings import Settings

    chat_loop.converse(Chat(open_answerer(ref), system, Settings(**sampling)))


@click.command()
@REFS
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="The port to listen on; 0 takes a free one.",
)
@click.option("--allow-network", is_flag=True, help="Allow an address that other machines reach. There is no password.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="The longest answer to a request that names no length.",
)
@where_it_is
def serve(refs: tuple[str, ...], host: str, port: int, allow_network: bool, max_new_tokens: int) -> None:
    """Answer programs by the OpenAI protocol, on this machine."""
    if missing := [name for name in ("starlette", "uvicorn") if not find_spec(name)]:
        raise FinetuneError(f"serve needs {' and '.join(missing)}", hint="pip install 'finetune[serve]'")
    with importing():
        from finetune.compare.serve import listening

    listening.serve(refs, (host, port), max_new_tokens, allow_network, click.echo)
