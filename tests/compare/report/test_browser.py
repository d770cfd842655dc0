"""The page in a real browser, opened from its file: no request, no complaint, no script of a row, and readable by keyboard.

They skip where no Chromium is installed: Debian's package takes 20 CPU seconds and 350 MB to install, so CI does without.
"""

import math
import random
from pathlib import Path

import pytest

from finetune.compare.report import write
from finetune.compare.report.payload import Asked, Report
from finetune.compare.report.serve import server
from tests.compare.made_runs import committed, evaluated, event, made, step, whole
from tests.compare.made_runs import write as append
from tests.compare.report.chromium import BINARY, Page, chromium
from tests.compare.report.test_payload import evaluation, norms

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BINARY is None, reason="no Chromium is installed here")]
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&lt;b&gt;\u2028"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(autouse=True)
def _nothing_is_asked_for_or_complained_of(page: Page):
    page.requests.clear()
    page.problems.clear()
    yield
    page.settle()
    assert page.problems == []
    assert all(url.startswith(("file://", "http://127.0.0.1:")) for url in page.requests)


def opened(page: Page, folder: Path, *runs: Path, width: int = 1440, scheme: str = "light") -> Page:
    output = folder / "report.html"
    write.write(Report(runs, Asked()), output, None)
    page.size(width)
    page.scheme(scheme)
    page.open(output.as_uri())
    page.settle()
    assert page.requests == [output.as_uri()]
    return page


def rich(run: Path, rate: float = 1.0, **recipe: dict) -> Path:
    """A run with everything that a report can show."""
    whole(run, 40, rate, **recipe)
    for number in (0, 10, 20, 30, 40):
        evaluation(run, number, -number / 100)
    norms(run, 1, 40, rate)
    later = {"first": 41, "last": 42, "action": "rollback", "reason": "spike", "step": 42, "to": 40, "message": HOSTILE}
    lines = [
        step(41, 9.0),
        step(42, 99.0),
        event("amended", **later),
        step(43, 1.0),
        event("spike", step=43, message=HOSTILE),
    ]
    append(run, [*lines, event("started", step=43, at=9000)])
    return run


@pytest.mark.parametrize("width", [360, 768, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_has_every_part(page, tmp_path, width, scheme) -> None:
    opened(page, tmp_path, rich(tmp_path / "a"), rich(tmp_path / "b", 2.0), width=width, scheme=scheme)
    assert page.value("document.documentElement.scrollWidth") <= width
    ids = ["summary", "loss", "held-out-loss", "difference-loss", "learning_rate", "grad_norm", "tokens_per_second"]
    for name in [*ids, "modules", "timeline", "samples"]:
        assert page.value(f"!!document.getElementById('{name}')"), name
    assert page.value(
        "[...document.querySelectorAll('.chart canvas')].every(each => each.width > 0 && each.height > 0)"
    )
    dark = page.value("getComputedStyle(document.body).backgroundColor") == "rgb(16, 19, 23)"
    assert dark == (scheme == "dark")
    page.value("[...document.querySelectorAll('button')].find(each => each.textContent === 'Light or dark').click()")
    assert (page.value("getComputedStyle(document.body).backgroundColor") == "rgb(16, 19, 23)") != dark


def test_texts_of_rows_runs_and_events_are_never_markup(page, tmp_path) -> None:
    run = rich(tmp_path / "a<script>document.title='owned'<")
    for number in (0, 40):
        evaluation(run, number, -number / 100, answers=[HOSTILE] * 40)
    opened(page, tmp_path, run)
    page.value("document.querySelectorAll('details').forEach(each => { each.open = true })")
    page.settle()
    assert "owned" not in page.value("document.title").replace("document.title='owned'", "")
    assert page.value("document.querySelectorAll('img, b, iframe, object').length") == 0
    assert page.value("document.querySelectorAll('script').length") == 3
    assert HOSTILE in page.value("document.querySelector('#samples').textContent")
    assert HOSTILE in page.value("document.querySelector('#timeline').textContent")


def test_its_policy_lets_no_other_script_run(page, tmp_path) -> None:
    opened(page, tmp_path, whole(tmp_path / "run", 8))
    page.value(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title = 1'}))"
    )
    page.value("fetch('http://127.0.0.1:1/').catch(() => 0)")
    page.settle()
    assert page.value("document.title") != "1"
    assert len(page.problems) >= 2 and all(
        "Content Security Policy" in each or "Fetch API" in each for each in page.problems
    )
    page.problems.clear()


def test_it_is_read_by_keyboard(page, tmp_path) -> None:
    opened(page, tmp_path, rich(tmp_path / "run"))
    page.value("document.querySelector('#loss .plot').focus()")
    page.press("End")
    page.press("ArrowLeft")
    page.press("Home")
    page.press("ArrowRight")
    said = page.value("document.querySelector('#loss .said').textContent")
    assert "run: " in said and "at step 2;" in said and "held-out: " in said
    page.value("document.querySelector('#modules canvas').focus()")
    page.press("ArrowRight")
    page.press("ArrowDown")
    assert page.value("document.querySelector('#modules .reading').textContent") == "layers.10, step 1: 1"
    page.value("document.querySelector('#loss details').open = true")
    page.settle()
    cells = page.value("[...document.querySelectorAll('#loss tbody tr:first-child')].map(each => each.textContent)")
    assert cells[0].startswith("1")


def test_pointing_shows_exact_numbers(page, tmp_path) -> None:
    run = made(tmp_path / "run", 9, [step(number, 1 / number) for number in range(1, 9)])
    opened(page, tmp_path, run)
    left, top, wide = page.value(
        "(box => [box.left, box.top + box.height / 2, box.width])(document.querySelector('#loss .u-over').getBoundingClientRect())"
    )
    page.point(left + wide * 2 / 7, top)
    page.settle()
    assert page.value("document.querySelector('#loss .tip').textContent") == f"{run}: 0.333333 at step 3"


def test_axis_means_and_hidden_runs_are_chosen(page, tmp_path) -> None:
    opened(page, tmp_path, rich(tmp_path / "a"), rich(tmp_path / "b", 2.0))
    for place, choice in enumerate(("tokens", "2")):
        page.value(
            f"(each => {{ each.value = '{choice}'; each.dispatchEvent(new Event('change')) }})(document.querySelectorAll('.controls select')[{place}])"
        )
    page.value("document.querySelector('.controls input').click(); document.querySelector('.legend button').click()")
    page.value("document.querySelector('#loss .plot').focus()")
    page.press("Home")
    said = page.value("document.querySelector('#loss .said').textContent")
    assert f"{tmp_path / 'a'}:" not in said and "at steps 1 to 2;" in said


def test_a_hundred_thousand_steps_are_drawn_from_at_most_three_megabytes(page, tmp_path) -> None:
    chance = random.Random(0)
    lines = (step(number, 2 + chance.gauss(0, 0.1), grad_norm=chance.gauss(1, 0.1)) for number in range(1, 100_001))
    run = made(tmp_path / "run", 100_000, lines)
    append(run, [evaluated(100_000, 2.0), committed(100_000)])
    opened(page, tmp_path, run)
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    assert page.value("document.querySelectorAll('.chart canvas').length") >= 4


@pytest.mark.parametrize(
    "lines", [[], [evaluated(0, 3.0)], [step(1, "nan")], [step(1, 1e300), step(2, -1e300), step(3, math.inf)]]
)
def test_a_run_in_any_state_is_shown(page, tmp_path, lines) -> None:
    opened(page, tmp_path, made(tmp_path / "run", 9, [line.replace("Infinity", '"inf"') for line in lines]))
    assert page.value("document.querySelectorAll('.chart').length") >= 1


def test_twenty_runs_are_shown_at_once(page, tmp_path) -> None:
    opened(page, tmp_path, *(whole(tmp_path / f"run {number}", 30, number) for number in range(1, 21)), width=360)
    assert page.value("document.querySelectorAll('.legend button').length") == 20
    assert page.value("document.documentElement.scrollWidth") <= 360


def test_a_served_page_follows_its_run(page, tmp_path) -> None:
    import threading

    run = made(tmp_path / "run", 9, [step(1, 3.0)])
    with server(Report([run], Asked()), 0) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        page.open(serving.url)
        assert "1 of 9" in page.value("document.querySelector('#summary').textContent")
        append(run, [step(2, 2.0)])
        news = "new Promise(done => { const ask = () => /2 of 9/.test(document.querySelector('#summary').textContent) ? done(true) : setTimeout(ask, 50); ask() })"
        assert page.value(news)
        serving.shutdown()
    page.open("about:blank")
    page.requests.clear()
