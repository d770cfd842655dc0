"""`where` and `take` choose rows: a small grammar, numbers kept in the cache, and errors that name what is wrong."""

import json
from pathlib import Path

import pytest

from finetune.data import preflight
from finetune.data.sources import kept
from finetune.data.sources.open import Rows, open_source
from finetune.errors import DataError, RecipeError
from finetune.recipe import conditions
from finetune.recipe.load import loads
from finetune.recipe.schema import Source

ROWS = [
    {"text": "a", "lang": "en", "score": 1, "ok": True, "meta": {"kind": "x", "tags": ["t"]}, "a.b": "dot"},
    {"text": "b", "lang": "de", "score": 2.5, "ok": False, "meta": {"kind": "y"}},
    {"text": "c", "lang": None, "score": None, "ok": None, "meta": None},
    {"text": "d", "lang": "two words", "score": "3", "ok": "True"},
]
RECIPE = """
base: {{checkpoint: x}}
task: {{name: text}}
data:
  train:
    - {{{source}}}
    - {{path: other.jsonl, {other}}}
optimizer: {{learning_rate: 0.1}}
train: {{steps: 1}}
"""


@pytest.fixture
def source(tmp_path) -> Source:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return Source(path=str(tmp_path / "rows.jsonl"))


def chosen(source: Source, **keys: object) -> Rows:
    return open_source(source.model_copy(update=keys))


def texts(rows: Rows) -> str:
    return "".join(str(rows[index]["text"]) for index in range(len(rows)))


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("lang == en", "a"),
        ('lang == "two words"', "d"),
        ("lang != en", "bcd"),
        ("lang != null", "abd"),
        ("lang == null", "c"),
        ("lang in [en, de]", "ab"),
        ("lang in ('de', null)", "bc"),
        ("score > 1", "bd"),
        ("score >= 1 and score < 3", "ab"),
        ("score == 3", "d"),
        ("score <= 1.0", "a"),
        ("ok == true", "ad"),
        ("ok != true", "bc"),
        ("meta.kind == x", "a"),
        ("meta.tags.0 == t", "a"),
        ("meta.kind > x", "b"),
        ("a.b == dot", "a"),
        ("`a.b` != dot", "bcd"),
        ("text >= b and lang != null", "bd"),
    ],
)
def test_a_condition_keeps_the_rows_it_is_true_of(where, expected, source) -> None:
    rows = chosen(source, where=where)
    assert texts(rows) == expected
    assert rows.about == f"JSON Lines, kept {len(expected)} of 4 rows"


def test_a_number_of_thousands_of_digits_is_compared(tmp_path) -> None:
    (tmp_path / "rows.csv").write_text(f"text,n\na,1\nb,{'9' * 5000}\n")
    assert texts(open_source(Source(path=str(tmp_path / "rows.csv"), where="n > 1"))) == "b"


def test_a_row_that_cannot_be_read_is_kept_for_on_bad_row_to_decide(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "n": 1}\n{"text": \n{"text": "c", "n": 3}\n')
    rows = open_source(Source(path=str(tmp_path / "rows.jsonl"), where="n > 2"), form="text", skips_bad=True)
    assert len(rows) == 2 and rows[1]["text"] == "c"
    with pytest.raises(DataError, match="rows.jsonl:2: bad JSON"):
        rows[0]


def test_take_counts_after_where_and_reads_no_row_after(source) -> None:
    with open(str(source.path), "a") as file:
        file.write("broken\n")
    assert texts(chosen(source, where="lang != null", take=2)) == "ab"
    assert (texts(chosen(source, take=3)), chosen(source, take=3).about) == ("abc", "JSON Lines, the first 3 rows")
    rows = chosen(source, where="lang != null", take=2)
    assert (rows.where(1), rows.about) == (f"{source.path}:2", "JSON Lines, kept 2 of 2 rows")
    with pytest.raises(DataError, match="rows.jsonl:5: bad JSON"):
        texts(chosen(source, where="lang != null", take=4))


def test_kept_rows_are_found_once(source, monkeypatch) -> None:
    first = texts(chosen(source, where="lang != en"))
    monkeypatch.setattr(kept, "_found", None)
    assert texts(chosen(source, where="lang != en", columns={})) == first
    with pytest.raises(TypeError):
        chosen(source, where="lang != de")


def test_conditions_read_the_names_of_the_file_and_may_name_a_skipped_column(source) -> None:
    rows = chosen(source, where="lang == en", columns={"body": "text"}, skip=["lang"])
    assert rows[0]["body"] == "a" and "lang" not in rows[0]


def test_a_column_of_no_row_is_an_error_with_the_columns(source) -> None:
    with pytest.raises(DataError) as caught:
        chosen(source, where="lnag == en")
    assert str(caught.value) == (
        f"{source.path}:1: no column `lnag`, there is `text`, `lang`, `score`, `ok`, `meta`, `a.b`\n"
        "hint: correct `where` in the recipe"
    )
    with pytest.raises(DataError, match="holds no rows that `where` keeps"):
        chosen(source, where="lang == fr")


def test_the_recipe_is_named_where_a_condition_names_no_column(source) -> None:
    loaded = loads(
        RECIPE.format(source=f"path: {source.path}, weight: 1, where: lnag == en", other="weight: 1"), "r.yaml"
    )
    with pytest.raises(RecipeError) as caught:
        preflight.check(loaded)
    said = "r.yaml:6: data.train[0].where: no column `lnag`, there is `text`, `lang`, `score`, `ok`, `meta`, `a.b`"
    assert str(caught.value) == said


def test_values_without_an_order_are_refused_with_the_row(source) -> None:
    with pytest.raises(DataError) as caught:
        chosen(source, where="lang > 3")
    assert str(caught.value).startswith(f'{source.path}:1: `lang` is "en", which has no order with 3')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lang = en", "needs one of == != < <= > >= in after `lang`; equality is `==`"),
        ("lang == en or lang == de", "has `or`: list the values with `in [...]`, or give two sources"),
        ("lang == two words", "has `words` where `and` is expected; put quotes around text of several words"),
        ("lang == 'en", "has a quote that does not end: `'en`"),
        ("lang in en", "needs a list after `lang in`, like `[en, de]`"),
        ("lang in [en", "has a list without `]` after `lang in`"),
        ("lang == en and", "must be like `column == value`, with `and` only between conditions"),
        ("lang ==", "needs a value after `lang ==`"),
        ("== en", "needs a column before `==`"),
        ("score < null", "`<` needs a number or text, for `score`"),
        ("__import__('os')", "needs one of == != < <= > >= in after `__import__`"),
    ],
)
def test_what_is_no_condition_is_said(text, message) -> None:
    with pytest.raises(ValueError) as caught:
        conditions.parse(text)
    assert str(caught.value) == message


def problems(source: str, other: str = "weight: 1") -> str:
    with pytest.raises(RecipeError) as caught:
        loads(RECIPE.format(source=source, other=other), "r.yaml")
    return str(caught.value)


def test_a_wrong_condition_names_key_and_line_and_comes_with_all_others() -> None:
    said = problems('path: a.jsonl, where: "lang = en"', "where: 'x', take: 0")
    assert said == (
        "r.yaml:6: data.train[0].where: needs one of == != < <= > >= in after `lang`; equality is `==`, not `lang = en`\n"
        "r.yaml:7: data.train[1].where: needs one of == != < <= > >= in after `x`, not `x`\n"
        "r.yaml:7: data.train[1].take: must be greater than 0, not `0`"
    )


def test_keys_that_do_not_go_together_are_refused_at_once() -> None:
    assert problems("path: a.csv.gz, row: line, files: [b.csv]", "row: paragraph") == (
        "r.yaml:6: data.train[0].files: goes with `dataset`, not with `path`\n"
        "hint: name several local files with a glob in `path`\n"
        "r.yaml:6: data.train[0].row: goes with text files (.txt, .md, .markdown, .rst), not with `.csv`\nhint: remove `row`\n"
        "r.yaml:6: data.train[0].row: goes with text files (.txt, .md, .markdown, .rst), not with `.csv`\nhint: remove `row`\n"
        "r.yaml:7: data.train[1].row: goes with text files (.txt, .md, .markdown, .rst), not with `.jsonl`\nhint: remove `row`"
    )
    assert problems("dataset: a/b, files: [../x], name: en, split: test", "take: 1") == (
        "r.yaml:6: data.train[0].name: has no meaning beside `files`, which chooses the files itself\nhint: keep one of the two\n"
        "r.yaml:6: data.train[0].files: `../x` is not a name in the data set\nhint: names begin at the data set's root\n"
        "r.yaml:6: data.train[0].split: `test` has no meaning beside `files`: all of them are the split `train`\n"
        "hint: name only the files of that split, or a slice like `train[:100]`"
    )


def test_settings_at_their_default_are_not_in_the_key_of_encoded_rows(tmp_path) -> None:
    from finetune.data.heldout.lineage import source_key
    from finetune.plan.plan import PinnedSource

    pin = PinnedSource(name="x", revision=None, fingerprint="f", rows=1)
    assert source_key(Source(path="x"), pin) == ("f", "{}")
    assert source_key(Source(path=str(Path("x")), take=3, where="a == b"), pin)[1] == '{"take": 3, "where": "a == b"}'
