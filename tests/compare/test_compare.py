"""`compare` pairs rows by their content, says what it cannot pair, and finds what differs."""

import csv
import dataclasses
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest

from finetune.compare import table
from finetune.compare.compare import Candidate, Question, compare
from finetune.compare.origins import Origin
from finetune.data.reread import Reread
from finetune.data.sources.open import fingerprint
from finetune.errors import DataError, FinetuneError
from finetune.plan.pinned import PinnedSource
from finetune.recipe.schema import Source
from finetune.recipe.schema.tasks import ChatTask
from finetune.store.evaluations import Evaluation

ROWS = 60
COST = {"tokens": 1200, "seconds": 60.0, "bytes": 4096}
MEASURES = {
    "loss": {"per": "tokens", "better": "lower"},
    "exact_match": {"per": "rows", "better": "higher"},
}


def candidate(ref: str, shift: float = 0.0, seed: int = 0, rows: int = ROWS) -> Candidate:
    """A ref with a loss a token that is shifted, on rows that all candidates share."""
    own, shared = np.random.default_rng(seed), np.random.default_rng(99)
    contents = np.arange(1, rows + 1, dtype=np.uint64) << np.uint64(58)
    contents = contents + np.arange(rows, dtype=np.uint64)
    tokens = shared.integers(3, 30, rows)
    losses = tokens * (shared.gamma(4, 0.5, rows) + shift + 0.05 * own.normal(size=rows))
    right = (shared.random(rows) < 0.5) ^ (own.random(rows) < 0.1)
    about = {"set": "held-out", "measures": MEASURES, "ref": ref, "data": "d", "model": ref, "settings": {}}
    columns = {"loss": losses, "exact_match": right.astype(float)}
    evaluation = Evaluation(about, contents, np.arange(rows), tokens, columns)
    return Candidate(Origin(ref, None, COST), evaluation)


def with_rows(given: Candidate, **changes: object) -> Candidate:
    return dataclasses.replace(given, evaluation=dataclasses.replace(given.evaluation, **changes))


def asked(*candidates: Candidate, sources: Reread | None = None, **question: object):
    return compare(candidates, Question(**question), sources)


def test_better_worse_and_alike_are_told_apart():
    found = asked(candidate("a"), candidate("b", -0.1, 1), candidate("c", 0.1, 2), candidate("d", 0.001, 3))
    assert [(pair["a"], pair["b"], pair["verdict"]) for pair in found["pairs"]] == [
        ("a", "b", "better"),
        ("a", "c", "worse"),
        ("a", "d", "not distinguishable"),
    ]
    assert (found["best"], found["leaders"], found["rows"]) == ("b", ["b"], ROWS)
    assert found["results"][0]["interval"][0] < found["results"][0]["value"] < found["results"][0]["interval"][1]
    assert 0 < found["pairs"][2]["smallest"] < 0.1
    assert found["notes"] == []


def test_the_order_of_rows_does_not_matter():
    one, two = candidate("a"), candidate("b", -0.1, 1)
    shuffled = np.random.default_rng(5).permutation(ROWS)
    evaluation = two.evaluation
    turned = with_rows(
        two,
        contents=evaluation.contents[shuffled],
        rows=evaluation.rows[shuffled],
        tokens=evaluation.tokens[shuffled],
        columns={name: column[shuffled] for name, column in evaluation.columns.items()},
    )
    assert asked(one, two) == asked(one, turned)


def test_rows_that_only_one_has_are_counted_and_said():
    found = asked(candidate("a"), candidate("b", -0.1, 1, rows=ROWS - 8))
    assert (found["rows"], found["results"][0]["unpaired_rows"], found["results"][1]["unpaired_rows"]) == (52, 8, 0)
    assert found["notes"] == [
        "a: 8 rows not compared: another ref does not have them, in the same tokens",
    ]


def test_rows_of_other_tokens_are_not_compared_by_their_loss_and_are_by_what_is_right():
    one, two = candidate("a"), candidate("b", -0.1, 1)
    other = with_rows(two, tokens=two.evaluation.tokens + (np.arange(ROWS) < 3))
    assert asked(one, other)["rows"] == ROWS - 3
    assert asked(one, other, metric="exact_match")["rows"] == ROWS
    with pytest.raises(DataError, match="no row in common"):
        asked(one, with_rows(two, tokens=two.evaluation.tokens + 1))
    with pytest.raises(DataError, match="no row in common"):
        asked(one, with_rows(two, contents=two.evaluation.contents + np.uint64(1000)))


def test_equal_rows_are_one_unit():
    def twice(given: Candidate) -> Candidate:
        evaluation = given.evaluation
        columns = {name: np.tile(column, 2) for name, column in evaluation.columns.items()}
        each = {name: np.tile(getattr(evaluation, name), 2) for name in ("contents", "rows", "tokens")}
        return with_rows(given, columns=columns, **each)

    once, doubled = (asked(made(candidate("a")), made(candidate("b", -0.1, 1))) for made in (lambda one: one, twice))
    assert doubled["rows"] == once["rows"]
    assert doubled["pairs"][0]["interval"] == pytest.approx(once["pairs"][0]["interval"])


def test_a_ref_with_nan_rows_has_no_verdict_and_is_never_best():
    broken = candidate("b", -0.5, 1)
    broken.evaluation.columns["loss"][3] = np.nan
    found = asked(candidate("a"), broken, candidate("c", -0.1, 2))
    assert [pair["verdict"] for pair in found["pairs"]] == [None, "better"]
    assert (found["results"][1]["not_finite_rows"], found["results"][1]["interval"]) == (1, None)
    assert (found["best"], found["leaders"]) == ("c", ["c"])
    assert found["notes"] == ["b: 1 row NaN or infinite, so there is no interval and no verdict"]
    found = asked(broken, candidate("a"))
    assert found["pairs"][0]["verdict"] is None
    assert "name another one with --baseline" in found["notes"][1]
    assert "no verdict" in table.text(found)


def test_rows_that_are_nan_for_all_are_skipped():
    both = [candidate("a"), candidate("b", -0.1, 1)]
    for each in both:
        each.evaluation.columns["loss"][:2] = (np.nan, np.inf)
    found = asked(*both)
    assert (found["rows"], found["pairs"][0]["verdict"]) == (ROWS - 2, "better")
    assert found["notes"] == ["2 rows skipped: NaN or infinite for every ref"]
    for each in both:
        each.evaluation.columns["loss"][:] = np.nan
    with pytest.raises(DataError, match="every row is NaN or infinite"):
        asked(*both)


def test_models_that_are_all_broken_have_no_leader():
    one, two = candidate("a"), candidate("b")
    one.evaluation.columns["loss"][0], two.evaluation.columns["loss"][1] = np.nan, np.inf
    found = asked(one, two)
    assert (found["best"], found["leaders"], found["pairs"][0]["verdict"]) == ("a", [], None)
    assert table.text(found) and table.markdown(found) and table.comma_separated(found)


def test_few_rows_have_no_verdict():
    found = asked(candidate("a", rows=5), candidate("b", -1.0, 1, rows=5))
    assert (found["pairs"][0]["verdict"], found["pairs"][0]["interval"]) == (None, None)
    assert found["notes"] == ["fewer than 6 rows or clusters are paired, so there are no verdicts"]


def test_a_ref_against_itself_is_said_to_be_the_same():
    found = asked(candidate("a"), candidate("b"))
    assert found["pairs"][0]["verdict"] == "not distinguishable"
    assert found["notes"] == ["b has the same figures as the baseline in every row"]


def test_another_metric_turns_the_direction():
    right = candidate("b", seed=1)
    right.evaluation.columns["exact_match"][:] = 1
    found = asked(candidate("a"), right, metric="exact_match")
    assert (found["better"], found["pairs"][0]["verdict"], found["best"]) == ("higher", "better", "b")
    with pytest.raises(DataError, match="no measure `rouge`") as error:
        asked(candidate("a"), right, metric="rouge")
    assert "loss, exact_match" in error.value.hint


def test_a_baseline_may_be_named_and_must_be_a_ref():
    found = asked(candidate("a"), candidate("b", -0.1, 1), baseline="b")
    assert (found["baseline"], found["pairs"][0]["a"], found["pairs"][0]["verdict"]) == ("b", "b", "worse")
    with pytest.raises(FinetuneError, match="`z` is not one of the refs"):
        asked(candidate("a"), baseline="z")


@pytest.fixture
def sources(tmp_path) -> Reread:
    """Two files with the rows that the candidates are about; every third row is of one topic."""
    pairs = []
    for name, numbers in (("one", range(25)), ("two", range(25, ROWS))):
        path = tmp_path / f"{name}.jsonl"
        messages = [
            [{"role": "user", "content": f"question {n}\x1b[31m"}, {"role": "assistant", "content": "yes"}]
            for n in numbers
        ]
        rows = [{"messages": turns, "topic": n % 20} for n, turns in zip(numbers, messages, strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        pin = PinnedSource(name=str(path), revision=None, fingerprint=fingerprint(str(path)), rows=len(rows))
        pairs.append((Source(path=str(path)), pin))
    return Reread(pairs, ChatTask(name="chat", max_length=64), 5)


def test_the_rows_that_changed_most_have_their_texts(sources):
    one, two = candidate("a"), candidate("b", -0.1, 1)
    two.evaluation.columns["loss"][30] += 900
    (pair,) = asked(one, two, sources=sources, changed=2)["pairs"]
    assert (pair["changed"][0]["row"], len(pair["changed"])) == (30, 2)
    assert pair["changed"][0]["text"] == "user: question 30\x1b[31m\nassistant: yes"
    shown = table.text(asked(one, two, sources=sources))
    assert "row 30: " in shown and "question 30␛[31m" in shown and "\x1b" not in shown


def test_a_file_that_changed_or_is_gone_gives_no_texts_and_all_figures(sources, tmp_path):
    both = candidate("a"), candidate("b", -0.1, 1)
    (tmp_path / "one.jsonl").write_text('{"messages": []}\n')
    found = asked(*both, sources=sources, changed=ROWS)
    assert found["pairs"][0]["verdict"] == "better" and found["pairs"][0]["changed"][0]["text"] is None
    assert "one.jsonl: has other content" in found["notes"][0]
    (tmp_path / "one.jsonl").unlink()
    assert "is not here any more" in asked(*both, sources=sources, changed=ROWS)["notes"][0]


def test_clusters_of_a_column_are_the_units(sources):
    one, two = candidate("a"), candidate("b", -0.1, 1)
    found = asked(one, two, sources=sources, cluster="topic")
    assert (found["cluster"], found["clusters"], found["rows"]) == ("topic", 20, ROWS)
    assert found["pairs"][0]["won"] + found["pairs"][0]["lost"] == 20
    assert "in 20 clusters" in table.text(found)
    with pytest.raises(FinetuneError, match="no column `author`"):
        asked(one, two, sources=sources, cluster="author")
    with pytest.raises(DataError, match="not at hand"):
        asked(one, two, cluster="topic")


def test_a_margin_makes_equivalence_a_verdict():
    found = asked(candidate("a"), candidate("b", 0.001, 1), margin=0.1)
    assert (found["margin"], found["pairs"][0]["verdict"]) == (0.1, "equivalent")


def test_one_ref_alone_has_its_value():
    found = asked(candidate("a"))
    assert (found["pairs"], found["best"], found["leaders"]) == ([], "a", ["a"])
    assert table.text(found).count("\n") > 1


def test_the_table_is_text_markdown_and_csv():
    found = asked(candidate("a"), candidate("b|", -0.1, 1), candidate("c", 0.001, 2))
    shown = table.text(found)
    assert shown.startswith("held-out: loss a token, lower is better; 60 rows with ")
    assert "baseline" in shown and "not distinguishable (rows can show 0." in shown
    assert "best: b|, by -0." in shown and ", allowing for the choice among 3" in shown
    assert "| b\\| |" in table.markdown(found)
    lines = list(csv.DictReader(io.StringIO(table.comma_separated(found))))
    assert [line["verdict"] for line in lines] == ["", "better", "not distinguishable"]
    assert float(lines[1]["difference"]) == found["pairs"][0]["difference"]
    assert (lines[0]["baseline"], lines[1]["baseline"], lines[1]["tokens"]) == ("", "a", "1200")


def test_two_seeds_of_one_recipe_are_said_to_be_that():
    def seeded(given: Candidate, step: int, **train: object) -> Candidate:
        recipe = SimpleNamespace(model_dump=lambda mode: {"train": train})
        return dataclasses.replace(given, origin=Origin(given.ref, SimpleNamespace(recipe=recipe), COST, step))

    one, two = seeded(candidate("a"), 5, seed=0), seeded(candidate("b", -0.1, 1), 5, seed=1)
    assert asked(one, two)["notes"] == ["a and b are two seeds of one recipe: their difference is that of the seeds"]
    assert asked(one, seeded(two, 6, seed=1))["notes"] == []
    assert asked(one, seeded(two, 5, seed=1, steps=9))["notes"] == []
