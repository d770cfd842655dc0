"""One way to name a checkpoint, with an answer that lists what there is."""

from pathlib import Path

import pytest

from finetune.errors import CheckpointError
from finetune.store.checkpoints.manifest import Manifest
from finetune.store.checkpoints.refs import (
    CheckpointRef,
    FileRef,
    HubRef,
    ModelRef,
    OriginRef,
    PackageRef,
    StepRef,
    find,
    parse,
)
from finetune.store.checkpoints.store import Store


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`runs/a` with steps 100, 200 and 300, the second of which is the best."""
    monkeypatch.chdir(tmp_path)
    store = Store(Path("runs/a"))
    for step, loss in {100: 3.0, 200: 1.0, 300: 2.0}.items():
        manifest = Manifest(run="r", attempt="a1", step=step, parent=None, plan_id="p", metrics={"loss": loss})
        store.commit(store.begin(step, "a1"), manifest)
    (store.run / "plan.json").write_text("{}")
    return store.run


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("runs/a@100", StepRef("runs/a@100", run=Path("runs/a"), step=100)),
        ("runs/a@last", StepRef("runs/a@last", run=Path("runs/a"), step="last")),
        ("runs/none@best", StepRef("runs/none@best", run=Path("runs/none"), step="best")),
        ("runs/a@0", OriginRef("runs/a@0", run=Path("runs/a"), step=0)),
        ("runs/a", StepRef("runs/a", run=Path("runs/a"), step="last", is_implied=True)),
        ("runs/a/checkpoints/step-00000100", CheckpointRef("runs/a/checkpoints/step-00000100", path=Path("runs/a/checkpoints/step-00000100"))),
        ("owner/name", HubRef("owner/name", repo="owner/name")),
        ("owner/na-me.1@v2.0", HubRef("owner/na-me.1@v2.0", repo="owner/na-me.1", revision="v2.0")),
        ("owner/name/q4/a.gguf@v2", HubRef("owner/name/q4/a.gguf@v2", repo="owner/name", revision="v2", file="q4/a.gguf")),
        ("package:some_pkg/a/b.gguf", PackageRef("package:some_pkg/a/b.gguf", repo="some_pkg", path=Path("a/b.gguf"))),
    ],
)  # fmt: skip
def test_a_ref_is_read_as_what_it_names(run, text, ref):
    assert parse(text) == ref


@pytest.mark.parametrize("marker", ["config.json", "adapter_config.json"])
def test_a_directory_with_a_models_config_is_a_model(tmp_path, marker):
    (tmp_path / marker).write_text("{}")
    assert parse(str(tmp_path)) == ModelRef(str(tmp_path), path=tmp_path)


def test_a_gguf_file_that_is_there_comes_before_names_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "owner/name/a.gguf"
    assert parse(text) == HubRef(text, repo="owner/name", file="a.gguf")
    Path(text).parent.mkdir(parents=True)
    Path(text).write_bytes(b"GGUF")
    assert parse(text) == FileRef(text, path=Path(text))
    Path(text).with_suffix(".bin").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="is neither a directory nor a ref"):
        parse("owner/name/a.bin")


@pytest.mark.parametrize(
    "text",
    ["", "a", "./missing/dir", "a/b/c", "package:x/file.bin", "owner/name@", "/no/such", "/no/a.gguf", "a/b/../c.gguf"],
)
def test_what_is_no_ref_is_answered_with_the_forms(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = text or "?"
    with pytest.raises(CheckpointError) as caught:
        parse(text)
    assert caught.value.message == f"`{text}` is neither a directory nor a ref"
    assert caught.value.hint.startswith("name RUN@STEP, RUN@last, RUN@best, a directory")


def test_a_directory_of_something_else_says_what_it_lacks(tmp_path):
    with pytest.raises(CheckpointError, match="it has no plan.json, manifest.json, config.json or adapter_config.json"):
        parse(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("runs/a@100", 100),
        ("runs/a@last", 300),
        ("runs/a", 300),
        ("runs/a@best", 200),
        ("runs/a/checkpoints/step-00000100", 100),
    ],
)
def test_a_checkpoint_is_found(run, text, step):
    assert find(parse(text)).step == step


def test_a_missing_step_is_answered_with_those_that_exist(run):
    with pytest.raises(CheckpointError) as caught:
        find(parse("runs/a@450"))
    assert (
        str(caught.value)
        == "runs/a has no step 450; committed: 100, 200, 300\nhint: name one of these steps, `last` or `best`"
    )


def test_a_missing_run_an_empty_run_and_an_unevaluated_run_say_so(run):
    with pytest.raises(CheckpointError, match="there is no run `runs/b`\nhint: check the path"):
        find(parse("runs/b@last"))
    Path("runs/c").mkdir()
    with pytest.raises(CheckpointError, match="runs/c has no checkpoint yet\nhint: "):
        find(parse("runs/c@last"))
    store = Store(Path("runs/c"))
    store.commit(store.begin(7, "a1"), Manifest(run="r", attempt="a1", step=7, parent=None, plan_id="p"))
    with pytest.raises(
        CheckpointError, match="runs/c has no evaluated checkpoint; committed: 7\nhint: set `evaluate.every`"
    ):
        find(parse("runs/c@best"))


def test_a_damaged_checkpoint_is_not_found_but_named(run):
    path = run / "checkpoints" / "step-00000200" / "manifest.json"
    path.unlink()
    path.write_bytes(b"{")
    with pytest.raises(
        CheckpointError,
        match="step-00000200/manifest.json: the manifest is torn or damaged\nhint: use another checkpoint",
    ):
        find(parse("runs/a@200"))
    assert find(parse("runs/a@best")).step == 300


def test_a_hub_id_is_not_a_checkpoint_of_a_run(run):
    with pytest.raises(CheckpointError, match="`owner/name` is not a checkpoint of a run"):
        find(parse("owner/name"))
