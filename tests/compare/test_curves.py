"""`curves` draws runs in any state, in any width, with and without braille and colors."""

import os
import pty
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from finetune.compare.curves import Choice, Screen, curves, open_series
from finetune.compare.terminal import Line, Look, number, panel
from finetune.errors import FinetuneError, RunError
from tests import forks
from tests.compare.made_runs import evaluated, event, made, step, whole, write

PLAIN = Screen(80, None, is_ascii=False, is_colored=False)


def test_the_usual_figures_are_drawn(tmp_path) -> None:
    run = whole(tmp_path / "run", 100)
    drawn = curves(open_series([run]), Choice(), PLAIN)
    assert "loss; points: held-out loss" in drawn and "learning rate" in drawn and "gradient norm" in drawn
    assert "●" in drawn and re.search("[\u2801-\u28ff]", drawn)
    assert f"{run}  step 100 of 100  loss 1.6851  held-out 1.7358 at step 100  10k tokens  200 tokens/s" in drawn
    assert max(map(len, drawn.splitlines())) <= max(80, len(str(run)) + 90)


def test_ascii_is_ascii_and_every_row_fits(tmp_path) -> None:
    runs = [whole(tmp_path / name, 30, rate) for name, rate in (("a", 1.0), ("b", 3.0))]
    for columns in (24, 80, 200):
        drawn = curves(open_series(runs), Choice(axis="tokens"), Screen(columns, None, is_ascii=True, is_colored=False))
        assert drawn.isascii()
        panels = drawn.partition("\na ")[0]
        assert max(map(len, panels.splitlines())) <= columns
        assert {"a", "A", "b", "B"} <= set(panels)


def test_colors_tell_runs_apart_where_there_are_some(tmp_path) -> None:
    runs = [whole(tmp_path / str(number), 8, number) for number in range(1, 21)]
    few, many = (curves(open_series(some), Choice(), Screen(80, None, False, True)) for some in (runs[:2], runs))
    assert "\x1b[36m" in few and "\x1b[35m" in few
    assert [line[0] for line in many.splitlines()[-20:]] == [*"abcdefghijklmnopqrst"]


def test_means_of_steps_are_said_with_what_they_hide(tmp_path) -> None:
    run = made(tmp_path / "run", 1000, [step(number, 99.0 if number == 431 else 1.0) for number in range(1, 1001)])
    assert "loss; means of 20 steps, highest 99 at step 431" in curves(open_series([run]), Choice(), PLAIN)
    assert "means of" not in curves(open_series([run]), Choice(smooth=1), PLAIN)


def test_no_point_is_lost_where_a_column_has_many() -> None:
    y = np.ones(100_000)
    y[[7, 54_321]] = (5.0, -5.0)
    (_, *rows) = panel("loss", [Line(np.arange(100_000.0), y, 0)], Look(60, 12), "steps")
    assert re.search("[\u2801-\u28ff]", rows[0]) and re.search("[\u2801-\u28ff]", rows[11])


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [event("started", step=0)],
        [evaluated(0, 3.0)],
        [step(1, "nan")],
        [step(1, 2.0)],
        [step(1, 1e300), step(2, -1e300), step(3, "inf"), step(4, "-inf")],
        [step(1, 5e-324), step(2, 5e-324)],
        [step(1, 2.0), "{torn"],
    ],
    ids=lambda lines: f"{len(lines)} lines",
)
def test_any_run_is_drawn(tmp_path, lines) -> None:
    run = made(tmp_path / "run", 9, lines)
    for is_ascii in (False, True):
        assert str(run) in curves(open_series([run, run]), Choice(), Screen(40, 20, is_ascii, False))


def test_what_is_not_drawn_is_said(tmp_path) -> None:
    rollback = event("amended", first=2, last=3, action="rollback", reason="spike", step=3, to=1)
    run = made(tmp_path / "run", 9, [step(1, "nan"), step(2, 2.0), step(3, 9.0), rollback, step(4, 1.0)])
    drawn = curves(open_series([run]), Choice(), PLAIN)
    assert f"{run}: the loss of 1 step is not finite" in drawn
    assert f"{run}: 2 steps given up by rollbacks, not drawn" in drawn


def test_a_name_moves_no_cursor(tmp_path) -> None:
    drawn = curves(open_series([whole(tmp_path / "a\x1b[2J \u202e<script>", 8)]), Choice(), PLAIN)
    assert "\x1b" not in drawn and "\u202e" not in drawn and "a?[2J ?<script>" in drawn


def test_an_unknown_figure_names_the_nearest(tmp_path) -> None:
    series = open_series([whole(tmp_path / "run", 8)])
    with pytest.raises(FinetuneError, match="`grad_nrm`\nhint: did you mean grad_norm?"):
        curves(series, Choice(("grad_nrm",)), PLAIN)
    assert "held-out loss" in curves(series, Choice(("held_out_loss",)), PLAIN).splitlines()[0]


def test_an_older_run_is_drawn() -> None:
    older = Path(__file__).parents[1] / "fixtures/older_run/runs/older"
    assert "step 8 of 12" in curves(open_series([older]), Choice(), PLAIN)


def test_a_folder_without_a_run_is_named(tmp_path) -> None:
    with pytest.raises(RunError, match="is not a run directory"):
        open_series([tmp_path])


@pytest.mark.parametrize(("value", "shown"), [(12_345, "12.35k"), (1000, "1k"), (4321, "4321"), (2e-5, "2.00e-05")])
def test_numbers_are_short(value, shown) -> None:
    assert number(value) == shown


def test_following_needs_a_terminal_and_ends_with_the_run(tmp_path, finetune) -> None:
    run = whole(tmp_path / "run", 8)
    refused = finetune("curves", run, "--follow")
    assert (refused.returncode, "needs" not in refused.stdout) == (2, True)
    ours, theirs = pty.openpty()
    process = forks.Popen([sys.executable, "-m", "finetune", "curves", str(run), "--follow"], stdout=theirs)
    os.close(theirs)
    written = b""
    while True:
        try:
            more = os.read(ours, 4096)
        except OSError:  # its end is closed
            break
        if not more:
            break
        written += more
    os.close(ours)
    assert process.wait(60) == 0
    assert written.startswith(b"\x1b[H\x1b[J") and b"step 8 of 8" in written


@pytest.mark.slow
def test_piped_output_has_no_colors(tmp_path, finetune) -> None:
    run = whole(tmp_path / "run", 8)
    assert "\x1b" not in finetune("curves", run, run).stdout
    assert finetune("curves", run, env={**os.environ, "PYTHONIOENCODING": "ascii"}).stdout.isascii()


def test_a_run_that_grows_is_drawn_again(tmp_path) -> None:
    run = made(tmp_path / "run", 2, [step(1, 2.0)])
    series = open_series([run])
    assert "step 1 of 2" in curves(series, Choice(), PLAIN)
    write(run, [step(2, 1.0)])
    assert [each.update() for each in series] == [True]
    assert "step 2 of 2" in curves(series, Choice(), PLAIN)
