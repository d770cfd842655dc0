"""Broken, huge and changing files, kills and disks: each ends in the right rows, or in one error with its place."""

import gzip
import io
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from finetune.data.sources import unpacked
from finetune.data.sources.open import open_source
from finetune.errors import DataError, FinetuneError
from scripts.faults.disk import CannotMount, make_image, mounted
from tests.data.sources.reading import every, refusal, written

LINES = "".join(f'{{"text": "row {number}"}}\n' for number in range(5000)).encode()


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(unpacked, "SMALL_BYTES", 0)
    return tmp_path / "cache"


@pytest.mark.parametrize("cut", [1, 8, 9, 40])
def test_a_packed_file_cut_short_is_refused_and_leaves_nothing(cut, tmp_path, _cache) -> None:
    source = written(tmp_path / "a.jsonl.gz", gzip.compress(LINES)[:-cut])
    assert refusal(source, FinetuneError).startswith(f"{tmp_path}/a.jsonl.gz: is not a whole `.gz` file: ")
    assert list((_cache / "unpacked").iterdir()) == []
    assert len(open_source(written(tmp_path / "a.jsonl.gz", gzip.compress(LINES)))) == 5000


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
def test_a_file_that_is_not_packed_as_its_name_says_is_refused(ending, tmp_path) -> None:
    source = written(tmp_path / f"a.jsonl{ending}", LINES)
    assert refusal(source, FinetuneError).startswith(f"{tmp_path}/a.jsonl{ending}: is not a whole `{ending}` file: ")


def test_nothing_packed_is_an_empty_file(tmp_path) -> None:
    assert refusal(written(tmp_path / "a.jsonl.gz", gzip.compress(b"")), FinetuneError).startswith(
        f"{tmp_path}/a.jsonl.gz: is empty"
    )


def test_a_small_packed_file_is_unpacked_in_memory_and_refused_alike(tmp_path, _cache, monkeypatch) -> None:
    monkeypatch.setattr(unpacked, "SMALL_BYTES", 1 << 16)
    source = written(tmp_path / "a.jsonl.gz", gzip.compress(LINES))
    assert len(open_source(source)) == 5000 and not _cache.exists()
    source = written(tmp_path / "b.jsonl.gz", gzip.compress(LINES)[:-9])
    assert refusal(source, FinetuneError).startswith(f"{tmp_path}/b.jsonl.gz: is not a whole `.gz` file: ")
    bomb = written(tmp_path / "c.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 200_000))
    assert len(open_source(bomb)) == 200_000 and _cache.exists()


def test_a_place_in_a_packed_file_is_the_line_of_what_is_in_it(tmp_path) -> None:
    source = written(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": }\n'))
    assert refusal(source, FinetuneError).startswith(f"{tmp_path}/a.jsonl.gz:2: bad JSON")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", b'{"text": "a"}\n{"text": "b"\n', ":2: bad JSON"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"},\n]', ":3: bad JSON"),
        ("a.json", b'[{"text": "a"}]\n[]', ":2: bad JSON: `[` after the end of the array"),
        ("a.json", b'[{"text": "a\nb"}]', ":1: bad JSON: Invalid control character at"),
        ("a.json", b'[{"text": "a"},\n{"text": "na\xefve"}]', ":2: is not UTF-8 text"),
        ("a.json", b"[" * 100_000, ":1: bad JSON: is nested too deep"),
        ("a.json", b"[1, 2]", "[0]: is not a JSON object"),
        ("a.json", b"[]", ": holds no rows"),
        ("a.json", '[{"text": "a"}]'.encode("utf-16"), ":1: is not UTF-8 text"),
        ("a.json", b'[{"text": "\\ud800"}]', "[0]: bad JSON"),
        ("a.jsonl", b'{"text": "%s"}\n{"text": "\0"}\n' % (b"a" * 32), ":2: bad JSON"),
        ("a.csv", "text\na\n".encode("utf-16-le"), ":1: is not UTF-8 text"),
        ("a.csv", b"text,b\na,1\nna\xefve,2\n", ":3: is not UTF-8 text"),
        ("a.csv", b'text,b\n"a\nb",1\n"c,2\n', ":4: bad CSV: unexpected end of data"),
        ("a.csv", b"text,b\na,1\r\nb,2\rc\n", ":4: has 1 value, the header 2 names"),
        ("a.txt", "some text".encode("utf-16"), ":1: is not UTF-8 text"),
        ("a.txt", b"\n" * 9, ": holds no rows"),
        ("a.arrow", b"ARROW1\0\0" + b"x" * 64, ": is not a whole Arrow file"),
        ("a.feather", b"FEA1" + b"\0" * 64, ": is Feather of version 1"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(name, content, expected, tmp_path) -> None:
    source = written(tmp_path / name, content)
    keys = {"row": "line"} if name == "a.txt" else {}
    assert refusal(source.model_copy(update=keys), FinetuneError).startswith(f"{tmp_path}/{name}{expected}")


def test_an_error_early_in_a_large_array_is_found_without_reading_the_rest(tmp_path) -> None:
    with open(tmp_path / "a.json", "wb") as file:
        file.write(b'[{"text": "a"},\n{"text": 1 2},\n')
        file.truncate(1 << 34)  # a sparse file of 16 GiB
    from finetune.data.sources.json_scanner import Scanner

    with open(tmp_path / "a.json", "rb") as file:
        scanner = Scanner(file, "a.json")
        scanner.skip("[")
        scanner.value()
        scanner.skip(",")
        with pytest.raises(DataError, match="a.json:2: bad JSON: Expecting ',' delimiter"):
            scanner.value()
        assert file.tell() <= 1 << 20


@pytest.mark.slow
def test_a_csv_field_of_many_megabytes_and_quotes_across_lines_are_read(tmp_path) -> None:
    long = 'x, "y"\n' * 1_500_000
    quoted = long.replace('"', '""')
    rows = open_source(written(tmp_path / "a.csv", f'text,b\n"{quoted}",1\nc,"2\n""3"\n'))
    assert rows[0]["text"] == long and rows[1] == {"text": "c", "b": '2\n"3'}
    assert rows.where(1) == f"{tmp_path}/a.csv:{1_500_000 + 3}"


def test_lines_that_end_in_several_ways_are_read(tmp_path) -> None:
    rows = open_source(written(tmp_path / "a.csv", "text,b\r\na,1\nb,2\r\nc,3\rd,4"))
    assert [(row["text"], row["b"]) for row in every(rows)] == [("a", "1"), ("b", "2"), ("c", "3"), ("d", "4")]


def test_an_unpacked_file_that_was_damaged_in_the_cache_is_made_again(tmp_path, _cache) -> None:
    source = written(tmp_path / "a.jsonl.gz", gzip.compress(LINES))
    expected = every(open_source(source))
    [content] = (_cache / "unpacked").glob(f"*/{unpacked.CONTENT}")
    content.write_bytes(content.read_bytes().replace(b"row 7", b"bad 7"))
    assert every(open_source(source)) == expected


def test_a_file_replaced_while_it_is_unpacked_is_refused(tmp_path, monkeypatch) -> None:
    source = written(tmp_path / "a.jsonl.gz", gzip.compress(LINES))
    opened = unpacked._opened

    def replaced(name, unpacking, packed):
        packed._file = io.BytesIO(gzip.compress(LINES[:-100]))
        return opened(name, unpacking, packed)

    monkeypatch.setattr(unpacked, "_opened", replaced)
    assert refusal(source, FinetuneError).startswith(f"{tmp_path}/a.jsonl.gz: was changed while it was unpacked")


def test_a_file_replaced_while_it_is_opened_is_refused(tmp_path, monkeypatch) -> None:
    source = written(tmp_path / "a.jsonl", LINES)
    from finetune.data.sources import open as opening

    fingerprint = opening._fingerprint

    def replaced(names, state):
        found = fingerprint(names, state)
        written(tmp_path / "new.jsonl", LINES[:-100])
        os.replace(tmp_path / "new.jsonl", names[0])
        return found

    monkeypatch.setattr(opening, "_fingerprint", replaced)
    assert refusal(source, FinetuneError).startswith(f"{tmp_path}/a.jsonl: was changed while it was encoded")


SLOW = """
import sys, time
from finetune.data.sources import unpacked
from finetune.data.sources.open import open_source
from finetune.recipe.schema import Source

def waits(name, stream):
    print("started", flush=True)
    time.sleep(60)

unpacked._piece, unpacked.SMALL_BYTES = waits, 0
open_source(Source(path=sys.argv[1]))
"""


def test_a_kill_while_unpacking_leaves_nothing_that_is_taken_for_the_whole(tmp_path, _cache) -> None:
    source = written(tmp_path / "a.jsonl.gz", gzip.compress(LINES))
    with subprocess.Popen([sys.executable, "-c", SLOW, source.path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "started\n"
        process.kill()
    assert [each.name.endswith(".building") for each in (_cache / "unpacked").iterdir()] == [True]
    assert every(open_source(source))[-1] == {"text": "row 4999"}


def test_two_that_unpack_at_once_make_one_entry(tmp_path, _cache, monkeypatch) -> None:
    source = written(tmp_path / "a.jsonl.gz", gzip.compress(LINES))
    made, begun, unpack = [], threading.Event(), unpacked._unpack

    def counted(*arguments):
        made.append(arguments)
        begun.wait(1)
        unpack(*arguments)

    monkeypatch.setattr(unpacked, "_unpack", counted)
    with ThreadPoolExecutor(2) as threads:  # the lock on an entry is one between open files
        both = [threads.submit(open_source, source) for _ in range(2)]
        begun.set()
        assert [len(each.result()) for each in both] == [5000, 5000]
    assert len(made) == 1 and len(list((_cache / "unpacked").glob("*/digests.json"))) == 1


def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", "/proc/nowhere")
    said = refusal(written(tmp_path / "a.jsonl.gz", gzip.compress(LINES)), FinetuneError)
    assert said.startswith("/proc/nowhere/unpacked: the cache cannot be written: ")
    assert said.endswith("\nhint: set FINETUNE_CACHE to a directory of yours")


@pytest.mark.slow
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    source = written(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 4_000_000))
    try:
        image = make_image(tmp_path / "disk.img", "32M")
        with mounted(image, tmp_path / "disk"):
            monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "disk/cache"))
            assert "the cache entry cannot be written: No space left on device" in refusal(source, FinetuneError)
            assert list((tmp_path / "disk/cache/unpacked").iterdir()) == []
    except CannotMount as error:
        pytest.skip(f"an image cannot be mounted: {error}")
