"""`finetune`: its commands, and what becomes of their errors. Never imports what imports torch.

Exit codes: 0 done, 1 a FinetuneError, 2 usage or recipe, 143, 130 and 129 after signals.
"""

import json
import os
import signal
import sys
import threading
from typing import NoReturn, NotRequired, TypedDict

import click

from finetune import __version__
from finetune.cli import (
    answering,
    averaging,
    comparing,
    data,
    debugging,
    encoding,
    history,
    machine,
    mirroring,
    packaging,
    seeing,
    sweeping,
    tracking,
    training,
)
from finetune.errors import DataError, FinetuneError, RecipeError, Stopped
from finetune.hosts import stderr, told
from finetune.hosts.signals import PARENT, end_with
from finetune.hosts.world import prepare_allocator
from finetune.store.rank import is_alone, is_first
from finetune.training.saving.writer import WRITER

COMMANDS = (
    *(
        training.plan,
        training.fetch,
        encoding.encode,
        training.train,
        training.launch,
        training.health,
        training.rehearse,
        tracking.track,
        mirroring.mirror,
    ),
    data.data,
    *(history.log, history.show, history.verify, history.prune),
    *(debugging.replay, debugging.bisect, debugging.diff, debugging.branch),
    *(comparing.evaluate, comparing.compare),
    *(seeing.curves, seeing.report),
    *(averaging.average, sweeping.sweep),
    *(answering.generate, answering.chat, answering.serve),
    *(packaging.package, packaging.publish),
    *(machine.schema, machine.doctor),
)
MOST_ROWS = 1000  # bad ones that an error lists as JSON


class BadRow(TypedDict):
    where: str | None
    message: str


class ErrorReport(TypedDict):
    """What an error is with `--json`, under the key `error`."""

    code: str
    message: str
    where: str | None
    hint: str | None
    rows: NotRequired[list[BadRow]]


@click.group(commands=COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="%(version)s")
def cli() -> None:
    """Fine-tune pretrained checkpoints; every checkpoint is a commit.

    A REF is RUN@STEP, RUN@last, RUN@best, a checkpoint or model directory, or a Hub id with @revision. For RUN you may give the address of a mirror, like s3://bucket/prefix.
    """


def main() -> None:
    """The console script: errors become messages and exit codes."""
    told.take(os.environ)
    stderr.secure()
    prepare_allocator(os.environ)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if parent := os.environ.pop(PARENT, None):
        end_with(int(parent))
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as request:
        sys.exit(request.exit_code)
    except click.ClickException as error:
        told.tell("usage")
        if "--json" in sys.argv:
            _print_error({"code": "usage", "message": error.format_message(), "where": None, "hint": None})
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except Stopped as stop:
        sys.exit(stop.exit_code)
    except (FinetuneError, RuntimeError) as error:
        known = error if isinstance(error, FinetuneError) else _lost_rank(error)
        if known is None:
            raise
        _report(known)
        told.tell(known.code)
        _leave(known.exit_code)
    except BrokenPipeError:  # the reader of our output went away, as in `finetune log … | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _leave(exit_code: int) -> NoReturn:
    """Ends the process also while a hung disk holds a thread: it may wake in native code, and abort an interpreter that ends."""
    if any(thread.name == WRITER for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


def _lost_rank(error: RuntimeError) -> FinetuneError | None:
    """What a rank says when another one is gone; None for a bug."""
    if is_alone(os.environ):
        return None
    from finetune.training.collectives import lost_rank

    return lost_rank(error)


def _report(error: FinetuneError) -> None:
    if not is_first(os.environ) and isinstance(error, RecipeError):  # all ranks meet it; one says so
        return
    if "--json" in sys.argv:
        facts: ErrorReport = {
            "code": error.code,
            "message": error.message,
            "where": error.where,
            "hint": error.hint,
        }
        if isinstance(error, DataError) and len(error.parts) > 1:
            facts["rows"] = [{"where": part.where, "message": part.message} for part in error.parts[:MOST_ROWS]]
        _print_error(facts)
    click.echo(str(error), err=True)


def _print_error(facts: ErrorReport) -> None:
    click.echo(json.dumps({"error": facts}))
