"""Rows are shown with what is learnt of them and why, checked without an end at a bad one, and written as messages."""

import json
import re
from dataclasses import replace

import pytest

from finetune.cli.main import main
from finetune.debug.rows import page, terminal
from finetune.debug.rows.check import check
from finetune.debug.rows.convert import convert
from finetune.debug.rows.report import listing
from finetune.debug.rows.show import show
from finetune.errors import DataError, FinetuneError
from finetune.recipe.load import load
from finetune.training.encoding import encoder_of
from finetune.training.recipe_rows import open_encoding, open_rows
from tests.conftest import chat_row

HOSTILE = "</pre><script>alert(1)</script> \x1b[31mred\x1b]0;title\x07 \u202eabc\u200b &amp; \"'`\r\0"
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"unit": null, "n": 1}'}}


@pytest.fixture
def recipe_of(recipe_file, tmp_path):
    """A function from rows to a loaded recipe; text is a line as it is."""

    def recipe_of(*rows, name="rows.jsonl", **sections):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return load(recipe_file(data={"train": [{"path": str(path)}]}, **sections))

    return recipe_of


def examples_of(loaded) -> list:
    rows, encode = open_rows(loaded), encoder_of(open_encoding(loaded))
    return [
        [(example.tokens.tolist(), example.supervised.tolist()) for example in encode([rows[number]], ["here"])[0]]
        for number in range(len(rows))
    ]


def test_shown_tokens_are_those_that_are_trained(recipe_of) -> None:
    loaded = recipe_of(*(chat_row(number) for number in range(5)))
    shown = show(loaded, None, 5, [])["examples"]
    for example, [(tokens, supervised)] in zip(shown, examples_of(loaded), strict=True):
        assert [token["id"] for token in example["tokens"]] == tokens
        assert [token["trained"] for token in example["tokens"]] == supervised
        assert all(token["reason"] and token["kept"] for token in example["tokens"])


def test_a_cut_row_is_shown_as_a_whole_and_its_cut_tokens_are_not_trained(recipe_of) -> None:
    row = chat_row(1)
    row["messages"][1]["content"] += " it was asked" * 20
    [example] = show(recipe_of(row), None, 1, [])["examples"]
    assert len(example["tokens"]) - example["cut"] == 64
    assert all(not token["trained"] and "max_length" in token["reason"] for token in example["tokens"][64:])
    assert "⟪" in terminal.marked(example, is_colored=False) and "asked" in example["text"][-30:]


def test_a_text_row_is_shown_in_its_parts(recipe_of) -> None:
    loaded = recipe_of({"text": "the row ends " * 20}, task={"name": "text", "max_length": 32})
    shown = show(loaded, None, 1, [])["examples"]
    assert len(shown) > 1 and "".join(example["text"] for example in shown).startswith("the row ends")
    assert [example["learnt"] for example in shown] == [len(example["tokens"]) - 1 for example in shown]


def test_rows_are_chosen_by_number_and_source(recipe_file) -> None:
    loaded = load(recipe_file())
    assert [example["row"] for example in show(loaded, None, 3, [])["examples"]] == [0, 1, 2]
    assert [example["row"] for example in show(loaded, None, 3, [41, 7])["examples"]] == [41, 7]
    [example] = show(loaded, "data.holdout[0]", 3, [1])["examples"]
    assert (example["row"], example["source"]) == (41, "data.holdout[0]")
    with pytest.raises(DataError, match="there is no row 48"):
        show(loaded, None, 3, [48])
    with pytest.raises(FinetuneError, match="no source `other`"):
        show(loaded, "other", 3, [])


def test_hostile_text_reaches_neither_the_terminal_nor_the_markup_of_a_page(recipe_of) -> None:
    row = {"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]}
    shown = show(recipe_of(row, task={"name": "chat", "max_length": 128}), None, 1, [])
    for is_colored in (False, True):
        written = terminal.text(shown, (3,), is_colored)
        rest = re.sub(r"\x1b\[[0-9;]*m", "", written) if is_colored else written
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u200b\u202e]", rest)
    html = page.page(shown, "<title>")
    assert html.count("<script>") == 1 and "alert(1)</script>" not in html and "\u202e" not in html
    assert "http" not in html.replace("http-equiv", "") and "&lt;title&gt;" in html


def test_a_bad_row_is_a_problem_and_not_the_end(recipe_of, tmp_path) -> None:
    rows = ["[", *(chat_row(number) for number in range(3)), '{"prompt": 5}', chat_row(9)]
    facts = check(recipe_of(*rows))
    assert not facts["ok"] and facts["rows"] == 6
    assert [(problem["check"], problem["row"]) for problem in facts["problems"]] == [("refused", 0), ("refused", 4)]
    assert "rows.jsonl:5: " in listing(facts).replace(str(tmp_path), "")
    assert sum(facts["tokens"]["counts"]) == 4


def test_a_bad_first_row_is_shown_as_refused_where_the_recipe_skips_bad_rows(recipe_file, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"messages": 3}, chat_row(1))))
    loaded = load(recipe_file(data={"train": [{"path": str(path)}], "on_bad_row": "skip"}))
    first, second = show(loaded, None, 2, [])["examples"]
    assert "`messages` must be a list" in str(first["refused"]) and second["refused"] is None


def test_drawn_held_out_rows_are_compared_with_the_others(recipe_file, chat_data, tmp_path) -> None:
    rows = [
        {"prompt": f"{number} " + "the model reads a row and writes " * 9, "completion": "an answer that ends"}
        for number in range(30)
    ]
    (tmp_path / "alike.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = check(load(recipe_file(data={"train": [{"path": str(tmp_path / "alike.jsonl")}], "holdout": 9})))
    assert (
        facts["held_out_rows"] == 9 and facts["counts"]["near_holdout"] >= 1 and "seen_holdout" not in facts["counts"]
    )


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_converted_rows_give_the_same_examples(recipe_of, recipe_file, tmp_path, ending) -> None:
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    loaded = recipe_of(
        chat_row(1),
        {"prompt": history, "completion": "the answer", "system": "reads", "id": 3},
        {
            "messages": [
                *history[:2],
                {**history[2], "content": "ö\ud83d".replace("\ud83d", "ü")},
                {"role": "assistant", "content": "d", "weight": 1},
            ],
            "id": None,
        },
        {
            "messages": [
                history[0],
                {"role": "assistant", "content": "no", "weight": 0},
                history[2],
                {"role": "assistant", "content": "e"},
            ],
            "note": "x",
        },
    )
    out = tmp_path / f"out.{ending}"
    assert convert(loaded, out, None, False)["rows"] == 4
    if ending == "jsonl.gz":
        import gzip

        out = tmp_path / "unpacked.jsonl"
        out.write_bytes(gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes()))
    again = load(recipe_file("again", data={"train": [{"path": str(out)}]}))
    assert examples_of(again) == examples_of(loaded)
    assert set(open_rows(again)[1]) - {"note"} == {"messages", "id"}


def test_an_output_is_whole_or_not_there(recipe_of, tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(DataError):
        convert(recipe_of(chat_row(1), "{"), out, None, False)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
    convert(recipe_of(chat_row(1)), out, None, False)
    with pytest.raises(FinetuneError, match="exists already"):
        convert(recipe_of(chat_row(2)), out, None, False)
    convert(recipe_of(chat_row(2)), out, None, True)
    assert json.loads(out.read_text()) == chat_row(2)
    with pytest.raises(FinetuneError, match="unknown ending"):
        convert(recipe_of(chat_row(2)), tmp_path / "out.xml", None, False)


def test_exit_codes_and_objects_are_those_of_the_contract(
    recipe_of, recipe_file, tmp_path, monkeypatch, capsys
) -> None:
    recipe_of(chat_row(1), chat_row(1))
    recipe = tmp_path / "tiny.yaml"
    for words, code in (
        (["check"], 1),
        (["check", "--skip", "duplicates"], 0),
        (["show"], 0),
        (["check", "--skip", "x"], 2),
        (["show", "--html", str(tmp_path / "gone/page.html")], 1),
    ):
        monkeypatch.setattr("sys.argv", ["finetune", "data", *words, str(recipe), "--json"])
        with pytest.raises(SystemExit) if code else pytest.MonkeyPatch.context() as ended:
            main()
        assert not code or ended.value.code == code
        facts = json.loads(capsys.readouterr().out)
        assert facts.keys() >= (
            {"examples"} if words == ["show"] else {"error"} if code == 2 or "show" in words else {"ok", "problems"}
        )


def test_rows_of_any_shape_are_shown_checked_and_written_as_the_task_reads_them(recipe_of, tmp_path) -> None:
    loaded = recipe_of(
        {"instruction": "it was", "input": "", "output": "said"}, {"instruction": "what", "output": "asked"}
    )
    examples = show(loaded, None, 2, [])["examples"]
    learnt = ["".join(token["text"] for token in example["tokens"] if token["trained"]) for example in examples]
    assert learnt == ["said<|im_end|>", "asked<|im_end|>"]
    assert check(loaded, ())["ok"]
    convert(loaded, tmp_path / "out.jsonl", None, False)
    written = [json.loads(line)["messages"][1]["content"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written == ["said", "asked"]


def test_bad_rows_are_left_out_of_what_is_written_where_the_recipe_skips_them(recipe_of, tmp_path) -> None:
    loaded = recipe_of(chat_row(1), "{broken", chat_row(2))
    with pytest.raises(DataError):
        convert(loaded, tmp_path / "out.jsonl", None, False)
    data = loaded.recipe.data.model_copy(update={"on_bad_row": "skip"})
    skipping = replace(loaded, recipe=loaded.recipe.model_copy(update={"data": data}))
    assert convert(skipping, tmp_path / "out.jsonl", None, False)["skipped"] == 1
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
