"""Rows come by position from files and from the Hub, and what is wrong with one is said with its place."""

import os
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
from pyarrow import parquet
from ruamel.yaml import YAML

from finetune.data.sources import lines
from finetune.data.sources.hub import pin_dataset
from finetune.data.sources.open import Rows, open_source
from finetune.errors import DataError
from finetune.recipe.schema import Source

CORPUS = Path(__file__).parent.parent / "corpus"
EXPECTED = YAML(typ="safe", pure=True).load(CORPUS / "expected.yaml")
PIN = "0123456789abcdef0123456789abcdef01234567"


def rows_of(path: Path, content: bytes | str, **columns: str) -> Rows:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_source(Source(path=str(path), columns=columns))


def refusal(source: Source) -> str:
    with pytest.raises(DataError) as caught:
        open_source(source)
    return str(caught.value)


@pytest.mark.parametrize("name", EXPECTED["data"])
def test_a_broken_data_file_gets_exactly_its_message(name, monkeypatch):
    monkeypatch.chdir(CORPUS)
    with pytest.raises(DataError) as caught:
        rows = open_source(Source(path=f"data/{name}", columns=EXPECTED["columns"].get(name, {})))
        [rows[index] for index in range(len(rows))]
    assert str(caught.value) == EXPECTED["data"][name]


def test_json_lines_are_found_whatever_ends_and_separates_them(tmp_path):
    content = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n {"text": "\xc3\xa9"}\n{"text": "c"}'
    rows = rows_of(tmp_path / "rows.jsonl", content)
    assert [rows[index]["text"] for index in range(len(rows))] == ["a", "é", "c"]
    assert [rows.where(index) for index in range(3)] == [f"{tmp_path}/rows.jsonl:{line}" for line in (1, 4, 5)]


def test_json_lines_that_cross_the_edge_of_a_scan_stay_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "SCAN_BYTES", 7)
    rows = rows_of(tmp_path / "rows.jsonl", "".join(f'{{"text": "{"x" * size}"}}\n' for size in range(30)))
    assert [len(rows[index]["text"]) for index in range(len(rows))] == list(range(30))


def test_json_lines_may_be_called_json(tmp_path):
    assert rows_of(tmp_path / "rows.json", '{"text": "a"}\n{"text": "b"}\n')[1] == {"text": "b"}


def test_csv_rows_are_placed_at_their_first_line(tmp_path):
    rows = rows_of(tmp_path / "rows.csv", '\ufefftext,title\r\n"two\nlines, ""quoted""",b\r\n\r\nc,\r\n')
    assert [rows[0], rows[1]] == [{"text": 'two\nlines, "quoted"', "title": "b"}, {"text": "c", "title": ""}]
    assert [rows.where(0), rows.where(1)] == [f"{tmp_path}/rows.csv:2", f"{tmp_path}/rows.csv:5"]


def test_a_csv_value_may_be_long(tmp_path):
    assert len(rows_of(tmp_path / "rows.csv", "text\n" + "x" * 200_000)[0]["text"]) == 200_000


def test_parquet_rows_come_out_of_every_row_group_as_plain_values(tmp_path):
    messages = [
        [{"role": "user", "content": f"question {row}"}, {"role": "assistant", "content": "yes"}] for row in range(10)
    ]
    table = pyarrow.table({"messages": messages, "id": list(range(10))})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=4)
    rows = open_source(Source(path=str(tmp_path / "rows.parquet")))
    assert len(rows) == 10
    assert [rows[index] for index in (9, 0, 4, 3)] == [{"messages": messages[row], "id": row} for row in (9, 0, 4, 3)]
    assert rows.where(7) == f"{tmp_path}/rows.parquet row 7"


def test_columns_rename_and_leave_the_others(tmp_path):
    rows = rows_of(
        tmp_path / "rows.jsonl", '{"prompt": "p", "answer": "a", "id": 1}', prompt="answer", completion="prompt"
    )
    assert rows[0] == {"prompt": "a", "completion": "p", "id": 1}


def test_the_fingerprint_is_of_the_content_and_not_of_name_or_time(tmp_path):
    first = rows_of(tmp_path / "a.jsonl", '{"text": "a"}\n')
    same = rows_of(tmp_path / "b.jsonl", '{"text": "a"}\n')
    os.utime(tmp_path / "a.jsonl", (0, 0))
    other = rows_of(tmp_path / "c.jsonl", '{"text": "b"}\n')
    assert first.fingerprint == same.fingerprint == open_source(Source(path=first.name)).fingerprint
    assert first.fingerprint.startswith("blake3:") and first.fingerprint != other.fingerprint


def test_a_row_beyond_the_end_is_an_index_error_so_that_iteration_ends(tmp_path):
    rows = rows_of(tmp_path / "rows.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    assert [row["text"] for row in rows] == ["a", "b"]
    with pytest.raises(IndexError, match="row -1 of 2 rows"):
        rows[-1]


def test_a_path_that_is_not_there_or_is_a_directory_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder.jsonl").mkdir()
    assert refusal(Source(path="x.jsonl")) == "x.jsonl: no such file\nhint: a path is seen from the working directory"
    assert (
        refusal(Source(path="folder.jsonl"))
        == "folder.jsonl: has no file of rows\nhint: rows are read from .jsonl, .json, .ndjson, .csv, .tsv, .parquet, "
        ".arrow, .feather, .txt, .md, .markdown, .rst"
    )


def test_a_hub_data_set_is_loaded_at_its_pin_and_known_by_it(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return datasets.Dataset.from_list([{"body": "a"}, {"body": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(dataset="owner/name", name="en", split="train[:2]", columns={"text": "body"})
    rows = open_source(source, PIN)
    assert asked == [(("owner/name", "en"), {"split": "train[:2]", "revision": PIN})]
    assert (rows.name, len(rows), rows[1]) == ("owner/name", 2, {"text": "b"})
    assert rows.where(1) == "owner/name@01234567 train[:2] row 1"
    assert rows.fingerprint != open_source(source, PIN[::-1]).fingerprint


def test_a_data_set_is_pinned_to_the_commit_of_its_revision(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "dataset_info",
        lambda self, *_, **options: SimpleNamespace(sha=f"sha of {options['revision']}"),
    )
    assert pin_dataset(Source(dataset="owner/name", revision="v1")) == "sha of v1"
    assert pin_dataset(Source(dataset="owner/name", revision=PIN)) == PIN


def _raises(error):
    def call(*_, **__):
        raise error

    return call


def test_a_data_set_that_is_not_there_is_a_data_error(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", _raises(datasets.exceptions.DatasetNotFoundError("long story")))
    assert refusal(Source(dataset="owner/name", revision=PIN)) == (
        "owner/name: no such data set on the Hub\nhint: check its name; a private or gated one needs `hf auth login`"
    )


def test_a_split_that_is_not_there_is_a_data_error(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", _raises(ValueError('Unknown split "x". Should be one of ["train"].')))
    assert refusal(Source(dataset="owner/name", split="x", revision=PIN)) == (
        'owner/name: cannot be loaded: Unknown split "x". Should be one of ["train"]\n'
        "hint: check `name`, `split` and `revision` in the recipe"
    )


def test_a_hub_out_of_reach_is_a_data_error(monkeypatch):
    import httpx2
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", _raises(httpx2.ConnectError("no route")))
    assert refusal(Source(dataset="owner/name")) == (
        "owner/name: the Hub cannot be reached\nhint: check the network, or name a local file with `path`"
    )


def test_a_local_path_of_the_same_name_does_not_stand_in_for_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    assert refusal(Source(dataset="owner/name")).startswith("owner/name: is also the name of a local path")


def test_skipped_columns_and_fields_of_messages_are_gone(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a", "thinking": "b"}], "system": "c", "id": [1], "own": {"thinking": 1}}'
    )
    rows = open_source(Source(path=str(tmp_path / "rows.jsonl"), skip=["thinking", "system"]))
    assert rows[0] == {"messages": [{"role": "user", "content": "a"}], "id": [1], "own": {"thinking": 1}}


def test_a_column_that_columns_would_hide_is_refused(tmp_path):
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path / "rows.jsonl", '{"prompt": "p", "question": "q"}', prompt="question")
    assert str(caught.value) == (
        f"{tmp_path}/rows.jsonl:1: has a column `prompt` beside `question`, which `columns.prompt` takes for it\n"
        "hint: name the one to drop: data.train[].skip: [prompt]"
    )
    source = Source(path=str(tmp_path / "rows.jsonl"), columns={"prompt": "question"}, skip=["prompt"])
    assert open_source(source)[0] == {"prompt": "q"}
    assert open_source(source.model_copy(update={"skip": []}), row_rules=1)[0] == {"prompt": "q"}


def test_fields_that_only_other_rows_have_are_not_nulls(tmp_path):
    calls = [{"city": "Oslo"}, {"unit": "km"}]
    rows = [{"messages": [{"role": "assistant", "tool_calls": [{"arguments": call}]}], "id": None} for call in calls]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    source = Source(path=str(tmp_path / "rows.parquet"))
    assert [open_source(source)[row] for row in (0, 1)] == rows
    old = open_source(source, row_rules=1)[0]["messages"][0]["tool_calls"][0]["arguments"]
    assert old == {"city": "Oslo", "unit": None}


def test_json_that_datasets_writes_into_parquet_is_read_and_keeps_its_nulls(tmp_path, monkeypatch):
    import datasets

    arguments = [{"city": "Oslo", "unit": None}, {"city": ["Oslo", 3]}]
    rows = [{"messages": [{"role": "assistant", "arguments": each}]} for each in arguments]
    features = datasets.Features(
        {"messages": datasets.List({"role": datasets.Value("string"), "arguments": datasets.Json()})}
    )
    made = datasets.Dataset.from_list(rows, features=features)
    made.to_parquet(tmp_path / "rows.parquet")
    source = Source(path=str(tmp_path / "rows.parquet"))
    assert [open_source(source)[row] for row in (0, 1)] == rows
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: made)
    hub = open_source(Source(dataset="owner/name"), PIN)
    assert [hub[row] for row in (0, 1)] == rows


def test_a_parquet_file_with_two_columns_of_a_name_is_refused(tmp_path):
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    source = Source(path=str(tmp_path / "rows.parquet"))
    assert refusal(source) == f"{tmp_path}/rows.parquet: repeated column name among `text`, `text`"
