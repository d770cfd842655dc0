"""What a file is, and its hash: read once, and again as soon as it was written to."""

from pathlib import Path

from finetune.package.contents import sha256


def test_a_file_that_was_written_again_is_hashed_again(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    first = sha256(path)
    opened = []
    monkeypatch.setattr(Path, "open", lambda *arguments: opened.append(arguments))
    assert sha256(path) == first and not opened
    monkeypatch.undo()
    with path.open("r+b") as file:
        file.write(b"two")
    assert sha256(path) != first
