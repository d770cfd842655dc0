"""What the terminal shows of a run: messages as lines of their own, progress in place on a terminal.

Everything goes to stderr, flushed at once. `run` owns the one `Progress`; other ranks than the first own a silent one.
"""

import sys
import threading
import time
from collections.abc import Callable

from finetune.errors import counted
from finetune.plan.pace import Pace

LINES_EVERY_SECONDS = 10.0  # into a pipe; a terminal's line is redrawn twice a second
REDRAW_EVERY_SECONDS = 0.5


class Progress:
    def __init__(self, steps: int, is_quiet: bool = False, is_silent: bool = False):
        self._steps = steps
        self._is_quiet = is_quiet or is_silent
        self._is_silent = is_silent
        self._is_terminal = sys.stderr.isatty()
        self._interval = REDRAW_EVERY_SECONDS if self._is_terminal else LINES_EVERY_SECONDS
        self._drawn_at = -float("inf")
        self._is_line_open = False
        self._lock = threading.Lock()
        self.pace: Pace | None = None
        """Set by `run` when it knows what there is to do."""

    def say(self, message: str) -> None:
        """A message on its own line, also with --quiet."""
        if not self._is_silent:
            with self._lock:  # the writer of checkpoints has its own thread
                self._clear()
                sys.stderr.write(f"{message}\n")
                # A pipe is buffered in blocks, and a kill would lose the last messages.
                sys.stderr.flush()

    def say_forecast(self, step: int) -> None:
        """How long the rest takes, unless --quiet."""
        if self.pace and not self._is_quiet:
            left = self.pace.left
            beside = f"{counted(left['evaluation'], 'evaluation')} and {counted(left['save'], 'save')} included"
            self.say(f"forecast at step {step}: {duration(self.pace.seconds_left)} left, {beside}")

    def step(self, step: int, loss: float, learning_rate: float, grad_norm: float, tokens: int, seconds: float) -> None:
        """The figures of a finished step; `tokens` and `seconds` are of this step."""
        if self.pace:
            self.pace.step(tokens)
        # Always shown, so that a log ends with the last figures.
        is_last = step == self._steps
        if self._is_quiet or (not is_last and time.monotonic() - self._drawn_at < self._interval):
            return
        self._drawn_at = time.monotonic()
        width = len(str(self._steps))
        line = (
            f"step {step:{width}d}/{self._steps}  loss {loss:.4f}  norm {grad_norm:.2f}  lr {learning_rate:.2e}  "
            f"{tokens / seconds:,.0f} tokens/s"
        )
        if self.pace:
            line += f"  {duration(self.pace.seconds_left)} left"
        self._draw(line)

    def evaluation(self, step: int, count: int) -> Callable[[int], None]:
        """To be called with the number of held-out examples that are done, of `count`: shown where it takes long."""
        started = drawn_at = time.monotonic()

        def tell(done: int) -> None:
            nonlocal drawn_at
            now = time.monotonic()
            if not self._is_quiet and now - drawn_at >= self._interval:
                drawn_at = now
                left = duration((now - started) / done * (count - done))
                self._draw(f"evaluating step {step}: {done:,} of {count:,} examples  {left} left")

        return tell

    def _draw(self, line: str) -> None:
        with self._lock:
            self._clear()
            sys.stderr.write(line if self._is_terminal else f"{line}\n")
            sys.stderr.flush()
            self._is_line_open = self._is_terminal

    def close(self) -> None:
        if self._is_line_open:
            print(file=sys.stderr, flush=True)
            self._is_line_open = False

    def _clear(self) -> None:
        if self._is_line_open:
            # Back to the first column, and erase the line: a shorter message would leave its end.
            print("\r\x1b[2K", end="", file=sys.stderr)
            self._is_line_open = False


def duration(seconds: float) -> str:
    """Like 0:07, 12:30 or 3:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
