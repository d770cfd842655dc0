"""Globs and folders are one source of many files: rows count through in the order of names, and a change of any file is seen."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest

from finetune.data.sources import many
from finetune.data.sources.open import (
    fingerprint,
    first_rows,
    located,
    open_source,
    reopen_source,
)
from finetune.data.sources.rows import state_of
from finetune.errors import DataError
from finetune.plan.plan import ROW_RULES, PinnedSource
from finetune.recipe.schema import Source
from finetune.store import places

FILES = {"b.jsonl": ["3"], "a/z.jsonl": ["1", "2"], "é.jsonl": ["5"], "b.jsonl.gz": ["4"]}


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, texts in FILES.items():
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return tmp_path / "corpus"


def texts(path: str, **keys: object) -> list[object]:
    rows = open_source(Source(path=path, **keys))
    return [rows[index]["text"] for index in range(len(rows))]


def refusal(path: str, **keys: object) -> str:
    with pytest.raises(DataError) as caught:
        texts(path, **keys)
    return str(caught.value)


def pinned(path: str) -> PinnedSource:
    rows = open_source(Source(path=path))
    return PinnedSource(name=path, revision=None, fingerprint=rows.fingerprint, rows=len(rows))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("corpus", "12345"),
        ("corpus/", "12345"),
        ("corpus/*.jsonl", "35"),
        ("corpus/*", "345"),
        ("corpus/**/*.jsonl", "1235"),
        ("corpus/**", "12345"),
        ("corpus/[ab].json?", "3"),
        ("corpus/[!b]*.jsonl", "5"),
        ("c*/a/*.jsonl", "12"),
        ("**/z.*", "12"),
    ],
)
def test_files_come_in_the_order_of_the_bytes_of_their_names(path, expected, corpus) -> None:
    assert "".join(map(str, texts(path))) == expected


def test_a_place_names_the_file_and_the_plan_says_how_many_there_are(corpus) -> None:
    (corpus / "notes.png").write_bytes(b"not rows")
    (corpus / "empty.jsonl").write_bytes(b"")
    (corpus / ".hidden.jsonl").write_text("broken")
    rows = open_source(Source(path="corpus"))
    assert [rows.where(index) for index in (1, 3)] == ["corpus/a/z.jsonl:2", "corpus/b.jsonl.gz:1"]
    assert (
        rows.about == "5 files, JSON Lines and JSON Lines in `.gz`, 1 of them without rows, 1 of other kinds not read"
    )


def test_files_of_several_kinds_are_refused_with_the_kinds(corpus) -> None:
    (corpus / "README.md").write_text("# Rows\n")
    assert refusal("corpus") == (
        "corpus: has files of several kinds: 4 JSON files, 1 text file\n"
        "hint: name those of one kind, like `corpus/**/*.jsonl`"
    )
    assert texts("corpus/*.md", row="line") == ["# Rows"]
    assert refusal("corpus/*.csv").startswith("corpus/*.csv: no file matches")
    assert refusal("corpus/a/*.jsonl", row="line").startswith("corpus/a/z.jsonl: is a JSON file, which has rows")


def test_bad_files_are_refused_together(corpus) -> None:
    (corpus / "c.csv").write_text("text\na\n")
    for name, content in (("d.csv", "a,b\n1\n"), ("e.csv", b"text\nna\xefve\n"), ("f.csv", "a,b\n1\n")):
        (corpus / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refusal("corpus/*.csv").startswith(
        "corpus/d.csv:2: has 1 value, the header 2 names\n  also corpus/f.csv:2\ncorpus/e.csv:2: is not UTF-8 text"
    )


def test_a_link_to_a_file_is_read_and_one_to_a_folder_or_to_nothing_is_refused(corpus, tmp_path) -> None:
    (tmp_path / "outside.jsonl").write_text('{"text": "outside"}\n')
    (corpus / "a/y.jsonl").symlink_to(tmp_path / "outside.jsonl")
    assert texts("corpus/a") == ["outside", "1", "2"]
    (corpus / "a/loop").symlink_to(corpus)
    for path in ("corpus", "corpus/**/*.jsonl"):
        assert refusal(path).startswith("corpus/a/loop: is a link to a folder, which is not followed")
    (corpus / "a/loop").unlink()
    (corpus / "x.jsonl").symlink_to("x.jsonl")
    assert refusal("corpus").startswith("corpus/x.jsonl: is a link that leads nowhere")


def test_the_fingerprint_covers_contents_in_order_and_no_names(corpus, tmp_path) -> None:
    shutil.copytree(corpus, tmp_path / "moved")
    (tmp_path / "moved/a").rename(tmp_path / "moved/A")
    os.utime(tmp_path / "moved/b.jsonl", (0, 0))
    before = fingerprint("corpus")
    assert before == fingerprint("moved") == fingerprint("moved/**/*")
    (tmp_path / "moved/A/z.jsonl").rename(tmp_path / "moved/z.jsonl")
    assert fingerprint("moved") != before, "another order"
    (corpus / "new.jsonl").write_text("")
    assert fingerprint("corpus") != before, "another file, even without rows"
    assert fingerprint("corpus/a") == fingerprint("corpus/a/z.jsonl"), "one file is that file"


def test_a_file_that_was_added_or_changed_is_seen_by_its_state_and_its_content(corpus) -> None:
    pin, state = pinned("corpus/**/*.jsonl"), state_of("corpus/**/*.jsonl")
    source = Source(path="corpus/**/*.jsonl")
    assert len(reopen_source(source, pin, state, ROW_RULES)) == 4
    (corpus / "c.jsonl").write_text('{"text": "new"}\n')
    with pytest.raises(DataError, match="was changed while it was encoded"):
        reopen_source(source, pin, state, ROW_RULES)
    assert pinned("corpus/**/*.jsonl").fingerprint != pin.fingerprint


def test_a_file_replaced_after_it_was_counted_is_refused_when_a_row_of_it_is_wanted(corpus, monkeypatch) -> None:
    monkeypatch.setattr(many, "OPEN_READERS", 1)
    rows = open_source(Source(path="corpus"))
    (corpus / "new").write_text('{"text": "another"}\n')
    (corpus / "new").replace(corpus / "b.jsonl")
    with pytest.raises(DataError) as caught:
        rows[2]
    assert str(caught.value) == (
        "corpus/b.jsonl: was changed while it was encoded\nhint: run again when nothing writes to it"
    )


def test_many_files_that_moved_are_found_by_content(corpus, tmp_path) -> None:
    (corpus / "b.jsonl.gz").unlink()
    for path in ("corpus", "corpus/**/*.jsonl"):
        pin = pinned(path)
        corpus.rename(tmp_path / "elsewhere")
        with pytest.raises(DataError, match="is not here any more"):
            located(Source(path=path), pin)
        with places.named([], {"corpus": "elsewhere"}):
            assert located(Source(path=path), pin).path == path.replace("corpus", "elsewhere")
        (tmp_path / "elsewhere/b.jsonl").write_text("")
        with places.named([], {"corpus": "elsewhere"}), pytest.raises(DataError, match="has other content"):
            located(Source(path=path), pin)
        (tmp_path / "elsewhere/b.jsonl").write_text('{"text": "3"}\n')
        (tmp_path / "elsewhere").rename(corpus)


def test_the_first_rows_do_not_open_the_files_after_them(corpus) -> None:
    (corpus / "c.jsonl").write_bytes(b"\xff\xfe")
    assert len(first_rows(Source(path="corpus"), 2)) == 2
    assert refusal("corpus").startswith("corpus/c.jsonl:1: is not UTF-8 text")
    assert texts("corpus", take=3) == ["1", "2", "3"]


@pytest.mark.slow
def test_thousands_of_small_files_need_few_descriptors(tmp_path) -> None:
    import resource

    for number in range(1500):
        (tmp_path / f"{number:04}.md").write_text(f"text {number}")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd")))  # by tests before
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 60, most[1]))
    try:
        found = texts(str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, most)
    assert found == [f"text {number}" for number in range(1500)]


def test_a_file_whose_name_has_the_signs_of_a_glob_is_that_file(corpus) -> None:
    (corpus / "rows[1].jsonl").write_text('{"text": "itself"}\n')
    assert texts("corpus/rows[1].jsonl") == ["itself"]
