"""Five spellings of each format are read, equally; what is found is said, and what fits in several ways is refused."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pytest
from pyarrow import parquet

from finetune.data.sources import json_documents, json_scanner, tables, unpacked
from finetune.data.sources.open import first_rows, open_source
from finetune.errors import DataError
from finetune.recipe.schema import Source
from tests.data.sources.reading import every, refusal, written

ROWS = [{"text": 'one, "1"; ü', "lang": "de"}, {"text": "two\nlines", "lang": "en"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
ARRAY = json.dumps(ROWS)
CSV = 'text,lang\n"one, ""1""; ü",de\n"two\nlines",en\n'


def table() -> pyarrow.Table:
    return pyarrow.Table.from_pylist(ROWS)


def stream(**options: object) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table().schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table(), max_chunksize=1)
    return sink.getvalue().to_pybytes()


def file_of_arrow(**options: object) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_file(sink, table().schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table(), max_chunksize=1)
    return sink.getvalue().to_pybytes()


def dictionary() -> bytes:
    encoded = table().set_column(1, "lang", table()["lang"].dictionary_encode())
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, encoded.schema) as writer:
        writer.write_table(encoded)
    return sink.getvalue().to_pybytes()


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(content)
    return sink.getvalue().to_pybytes()


def parquet_bytes(**options: object) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table(), sink, **options)
    return sink.getvalue().to_pybytes()


SPELLINGS: dict[str, list[tuple[str, str | bytes]]] = {
    "JSON Lines": [
        ("a.jsonl", LINES),
        ("b.jsonl", "\ufeff" + LINES.replace("\n", "\r\n")),
        ("c.ndjson", LINES.removesuffix("\n")),
        ("d.json", LINES.replace("\n", "\n\n")),
        ("e.JSONL", "\n \n" + LINES),
    ],
    "a JSON array": [
        ("a.json", ARRAY),
        ("b.json", json.dumps(ROWS, indent=2, ensure_ascii=False)),
        ("c.json", "\ufeff\r\n " + ARRAY.replace("}, {", "}\r\n,\r\n{")),
        ("d.json", json.dumps(ROWS, separators=(",", ":"))),
        ("e.json", json.dumps(ROWS, indent="\t") + "\n\n"),
    ],
    "of a JSON object": [
        ("a.json", json.dumps({"data": ROWS})),
        (
            "b.json",
            json.dumps({"version": "1", "data": ROWS, "splits": ["train"], "licence": {"name": "mit"}}, indent=1),
        ),
        ("c.json", json.dumps({"result": {"count": 2, "rows": ROWS}})),
        ("d.json", json.dumps({"empty": [], "rows": ROWS, "more": {"numbers": [1, 2], "deeper": {"list": [{}]}}})),
        ("e.json", "\ufeff" + json.dumps({"rows": ROWS}, indent=4).replace("\n", "\r\n")),
    ],
    "JSON objects": [
        ("a.json", "\n".join(json.dumps(row, indent=2) for row in ROWS)),
        ("b.json", "".join(json.dumps(row) for row in ROWS)),
        ("c.json", " ".join(json.dumps(row, indent=1) for row in ROWS) + "\n"),
        ("d.json", "\ufeff" + json.dumps(ROWS[0], indent=0) + "\r\n" + json.dumps(ROWS[1])),
        ("e.json", json.dumps(ROWS[0]) + " " + json.dumps(ROWS[1])),
    ],
    "CSV": [
        ("a.csv", CSV),
        ("b.csv", "\ufeff" + CSV),
        ("c.csv", CSV.replace(",lang\n", ",lang\r\n").replace("de\n", "de\r\n")),
        ("d.csv", CSV.replace(",", ";").replace("one;", "one,").replace("; ü", "; ü")),
        ("e.csv", '"text"|"lang"\n"one, ""1""; ü"|"de"\n\n"two\nlines"|"en"'),
    ],
    "TSV": [
        ("a.tsv", 'text\tlang\n"one, ""1""; ü"\tde\n"two\nlines"\ten\n'),
        ("b.tsv", 'text\tlang\n"one, ""1""; ü"\tde\n"two\nlines"\ten\n'),
        ("c.tsv", '\ufeff"text"\t"lang"\r\n"one, ""1""; ü"\t"de"\r\n"two\nlines"\t"en"\r\n'),
        ("d.tsv", "'text'\t'lang'\n'one, \"1\"; ü'\t'de'\n'two\nlines'\t'en'\n"),
        ("e.TSV", 'lang\ttext\nde\t"one, ""1""; ü"\nen\t"two\nlines"\n'),
    ],
    "Parquet": [
        ("a.parquet", parquet_bytes()),
        ("b.parquet", parquet_bytes(compression="zstd", row_group_size=1)),
        ("c.parquet", parquet_bytes(compression="none")),
        ("d.parquet", parquet_bytes(use_dictionary=False, version="1.0")),
        ("e.PARQUET", parquet_bytes(compression="gzip", data_page_version="2.0")),
    ],
    "Arrow": [
        ("a.arrow", file_of_arrow()),
        ("b.feather", file_of_arrow(compression="lz4")),
        ("c.arrow", stream()),
        ("d.arrow", stream(compression="zstd")),
        ("e.arrow", dictionary()),
    ],
    "packed": [
        ("a.jsonl.gz", gzip.compress(LINES.encode())),
        ("b.jsonl.zst", zstd(LINES.encode())),
        ("c.json.bz2", bz2.compress(ARRAY.encode())),
        ("d.csv.xz", lzma.compress(CSV.encode())),
        ("e.jsonl.gz", b"".join(gzip.compress(line.encode()) for line in LINES.splitlines(keepends=True))),
    ],
}
ALL = [(format, name, content) for format, spellings in SPELLINGS.items() for name, content in spellings]


@pytest.mark.parametrize(("format", "name", "content"), ALL, ids=[f"{each[0]}-{each[1]}" for each in ALL])
def test_every_spelling_of_a_format_gives_the_same_rows(format, name, content, tmp_path, monkeypatch) -> None:
    source = written(tmp_path / name, content)
    assert every(open_source(source)) == ROWS
    monkeypatch.setattr(json_documents, "SMALL_BYTES", 0)
    monkeypatch.setattr(unpacked, "SMALL_BYTES", 0)
    rows = open_source(source)
    assert every(rows) == ROWS
    assert format == "packed" or format in rows.about
    assert every(first_rows(source, 1)) == ROWS[:1]
    assert every(open_source(source.model_copy(update={"take": 1}))) == ROWS[:1]


def test_a_separator_is_said_and_what_rfc_4180_reads_stays(tmp_path) -> None:
    assert open_source(written(tmp_path / "a.csv", "a;b\n1;2\n")).about == "CSV separated by `;`"
    assert open_source(written(tmp_path / "e.csv", "a\tb\n1\t2\n")).about == "CSV separated by tabs"
    both = open_source(written(tmp_path / "b.csv", "a;b,c;d\n1;2,3;4\n"))
    assert (both.about, both[0]) == ("CSV", {"a;b": "1;2", "c;d": "3;4"})
    plain = open_source(written(tmp_path / "c.tsv", 'a\tb\n5" disk\t"x" y\n'))
    assert (plain.about, plain[0]) == ("TSV without quotes", {"a": '5" disk', "b": '"x" y'})
    assert open_source(written(tmp_path / "d.csv", "text\nonly; one\n"))[0] == {"text": "only; one"}


def test_values_and_lines_that_cross_the_edges_of_pieces_stay_whole(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(json_scanner, "PIECE_BYTES", 7)
    monkeypatch.setattr(json_documents, "SMALL_BYTES", 1000)
    monkeypatch.setattr(tables, "PIECE_BYTES", 5)
    many = [{"text": "ü" * size, "number": size * 1.5, "list": [size, None, True]} for size in range(40)]
    assert every(open_source(written(tmp_path / "a.json", json.dumps(many, indent=1)))) == many
    content = "text,b\r\n" + "".join(f'"{"x" * size}\r\ny",{size}\r\n' for size in range(30))
    rows = every(open_source(written(tmp_path / "a.csv", content)))
    assert [len(str(row["text"])) for row in rows] == [size + 3 for size in range(30)]


def test_a_place_in_a_json_document_is_the_number_of_its_item(tmp_path) -> None:
    source = written(tmp_path / "a.json", '{"data": [{"text": "a"}, {"text": "b", "text": "c"}]}')
    assert refusal(source, DataError).startswith(f"{tmp_path}/a.json data[1]: repeats the key `text`")
    assert open_source(written(tmp_path / "b.json", ARRAY)).where(1) == f"{tmp_path}/b.json[1]"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "a"}], "id": 1},
        {"prompt": "a", "completion": "b", "tools": [{"name": "c"}]},
        {"text": "a", "spans": [{"start": 1}]},
    ],
)
def test_an_object_that_is_a_row_itself_stays_one_row(row, tmp_path) -> None:
    assert every(open_source(written(tmp_path / "a.json", json.dumps(row)))) == [row]
    assert every(open_source(written(tmp_path / "b.json", json.dumps(row, indent=1)))) == [row]


def test_rows_of_text_files_are_files_paragraphs_or_lines(tmp_path) -> None:
    source = written(tmp_path / "a.md", "\ufeff# One\r\n\r\nfirst\r\nsecond\r\n \r\n\nthird\n")
    whole = open_source(source)
    assert every(whole) == [{"text": "# One\n\nfirst\nsecond\n \n\nthird\n"}]
    assert (whole.about, whole.where(0)) == ("text, a row a file", f"{tmp_path}/a.md")
    paragraphs = open_source(source.model_copy(update={"row": "paragraph"}))
    assert [row["text"] for row in every(paragraphs)] == ["# One", "first\nsecond", "third"]
    assert [paragraphs.where(index) for index in range(3)] == [f"{tmp_path}/a.md:{line}" for line in (1, 3, 7)]
    lines = open_source(source.model_copy(update={"row": "line"}))
    assert [row["text"] for row in every(lines)] == ["# One", "first", "second", "third"]
    assert lines.where(3) == f"{tmp_path}/a.md:7"


def test_the_same_bytes_under_another_kind_have_another_fingerprint(tmp_path) -> None:
    line = '{"text": "a"}\n'
    prints = {name: open_source(written(tmp_path / name, line)).fingerprint for name in ("a.jsonl", "b.json", "c.txt")}
    assert prints["a.jsonl"] == prints["b.json"] != prints["c.txt"]
    texts = {name: open_source(written(tmp_path / name, "a\tb,c\n1\t2,3\n")).fingerprint for name in ("a.csv", "a.tsv")}
    assert len(set(texts.values())) == 2


def test_what_datasets_saves_is_read_and_of_several_splits_one_is_asked_for(tmp_path, monkeypatch) -> None:
    import datasets

    made = datasets.Dataset.from_list(ROWS * 3)
    made.save_to_disk(tmp_path / "one", num_shards=2)
    rows = open_source(Source(path=str(tmp_path / "one")))
    assert every(rows) == ROWS * 3 and rows.about == "2 files, Arrow"
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "two")
    assert refusal(Source(path=str(tmp_path / "two")), DataError) == (
        f"{tmp_path}/two: has several splits: train, test\nhint: name one, like `{tmp_path}/two/train`"
    )
    assert every(open_source(Source(path=str(tmp_path / "two/test")))) == ROWS * 3
