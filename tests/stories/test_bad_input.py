"""Whatever is wrong is said in one clear error, with exit code 1 or 2, no traceback, and nothing lost."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from finetune.cli import main

ANSWERLESS = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs a command in this process; it must fail with an expected error, whose text is returned."""

    def refuse(*arguments: object, code: int = 1) -> str:
        monkeypatch.setattr(sys, "argv", ["finetune", *map(str, arguments)])
        with pytest.raises(SystemExit) as request:
            main()
        said = capsys.readouterr().err
        assert request.value.code == code, said
        return said

    return refuse


def test_a_base_that_is_not_there(refuse, recipe_file) -> None:
    recipe = recipe_file(base={"checkpoint": "package:no_such_package/model.gguf"})
    assert "package:no_such_package/model.gguf: no installed package is called `no_such_package`" in refuse(
        "plan", recipe
    )
    assert "neither a directory nor a ref" in refuse("plan", recipe_file(base={"checkpoint": "./nowhere"}))


def test_a_hub_base_without_a_network(refuse, recipe_file) -> None:
    said = refuse("plan", recipe_file(base={"checkpoint": "owner/name"}))
    assert said.startswith("owner/name: the Hub cannot be reached: ")
    assert "hint: `finetune fetch` a recipe where there is a network" in said


def test_an_encoder_is_not_a_language_model(refuse, recipe_file, tmp_path, capsys) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path / "encoder")
    capsys.readouterr()
    said = refuse("train", recipe_file(base={"checkpoint": str(tmp_path / "encoder")}), "--run", tmp_path / "run")
    assert said == "encoder: is not a language model: it is BertModel\nhint: choose a base that generates text\n"
    assert not (tmp_path / "run/plan.json").exists()


def test_an_adapter_that_fits_nothing(refuse, recipe_file) -> None:
    recipe = recipe_file(adapter={"name": "lora", "targets": ["qkv_proj"]})
    said = refuse("plan", recipe, code=2)
    line = 1 + recipe.read_text().splitlines().index("  targets:")
    assert said.startswith(
        f"{recipe}:{line}: adapter.targets: no linear layer is called `qkv_proj`\nhint: the base has "
    )


def test_a_context_longer_than_the_base_has(refuse, recipe_file) -> None:
    recipe = recipe_file(task={"name": "chat", "max_length": 4096}, train={"steps": 1})
    assert "task.max_length: 4096 is more than the base's 128 positions" in refuse("plan", recipe, code=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "train.jsonl: no such file"),
        ("", "train.jsonl: "),
        ('{"messages": [}\n', "train.jsonl:1: "),
        (
            '{"text": "x"}\n',
            "train.jsonl:1: has neither `messages` nor `prompt` and `completion`; its columns are: text",
        ),
        (
            '{"messages": [{"role": "user", "content": "x"}]}\n',
            "train.jsonl:1: has no assistant turn, so there is nothing to learn from it",
        ),
        ('{"prompt": "x", "completion": " "}\n', "train.jsonl:1: has an empty assistant turn"),
        (
            json.dumps({"prompt": "x" * 400, "completion": "y"}) + "\n",
            "train.jsonl:1: no row has a supervised token within task.max_length",
        ),
    ],
)
def test_data_that_cannot_be_learnt_from(content, message, refuse, recipe_file, tmp_path) -> None:
    if content is not None:
        (tmp_path / "train.jsonl").write_text(content)
    assert message in refuse("plan", recipe_file(data={"train": [{"path": str(tmp_path / "train.jsonl")}]}))


def test_a_template_that_does_not_train_its_stop_token(refuse, recipe_file, tmp_path) -> None:
    (tmp_path / "template.jinja").write_text(ANSWERLESS + "{% if add_generation_prompt %}{% endif %}")
    said = refuse(
        "plan", recipe_file(task={"name": "chat", "max_length": 64, "template": str(tmp_path / "template.jinja")})
    )
    assert "not with a stop token (`<|im_end|>`): the tuned model would not stop" in said


def test_holding_out_everything(refuse, recipe_file, chat_data) -> None:
    recipe = recipe_file(data={"train": [{"path": str(chat_data / "train.jsonl")}], "holdout": 40})
    assert "data.holdout takes 40 of 40 rows, so none is left to train on" in refuse("plan", recipe)


def test_a_run_directory_that_cannot_be_made(refuse, recipe_file, tmp_path) -> None:
    (tmp_path / "file").touch()
    assert refuse("train", recipe_file(), "--run", tmp_path / "file/run").startswith(f"{tmp_path / 'file/run'}: ")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_loses_nothing_that_was_committed(refuse, recipe_file, train, small_disk, monkeypatch) -> None:
    monkeypatch.setattr("finetune.plan.disk.COMPANION_BYTES", 0)
    recipe = recipe_file(adapter={"name": "lora", "rank": 4}, checkpoint={"every": "4 steps", "keep": {"last": 100}})
    filler = small_disk / "filler"
    filler.write_bytes(bytes(1_950_000))
    said = refuse("train", recipe, "--run", small_disk / "run", "--quiet")
    assert "save of step 8 skipped: " in said and "training goes on" in said
    assert "hint: free some space" in said.lower()
    assert "Traceback" not in said
    filler.unlink()
    train(recipe, small_disk / "run")
    assert (small_disk / "run/checkpoints/step-00000010").exists()


def test_a_read_only_disk(refuse, recipe_file, small_disk) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    said = refuse("train", recipe_file(), "--run", small_disk / "run")
    assert "read-only" in said.lower()


def test_a_cache_that_cannot_be_written(refuse, recipe_file, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file/cache"))
    assert "hint: set FINETUNE_CACHE to a directory of yours" in refuse("plan", recipe_file())


@pytest.mark.slow
def test_a_checkpoint_of_a_newer_format_is_not_taken_for_a_damaged_one(recipe_file, train, refuse, tmp_path) -> None:
    import blake3

    run = train(recipe_file(), tmp_path / "run")
    manifest = run / "checkpoints/step-00000010/manifest.json"
    body = manifest.read_text().rpartition('"digest": ')[0].replace('"schema": 1', '"schema": 99')
    manifest.chmod(0o644)
    manifest.write_text(f'{body}"digest": "blake3:{blake3.blake3(body.encode()).hexdigest()}"}}\n')
    said = refuse("evaluate", f"{run}@10")
    assert "was written by a newer version of finetune" in said


def test_a_learning_rate_that_explodes_stops_before_the_weights_are_lost(refuse, recipe_file, tmp_path) -> None:
    from finetune.store.run import journal

    train = {"steps": 60, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}
    optimizer = {"name": "sgd", "learning_rate": 9.9, "max_grad_norm": 1e30, "warmup": 0}
    recipe = recipe_file(
        adapter=None, optimizer=optimizer, train=train, guard={"spike": "ignore"}, data=without_holdout(recipe_file)
    )
    said = refuse("train", recipe, "--run", tmp_path / "run")
    assert "are not finite, so the update was refused; " in said
    events = [record for record in journal.read(tmp_path / "run") if record.get("event") == "not_finite"]
    last = max(journal.steps(journal.read(tmp_path / "run")))
    assert events[0]["step"] == last + 1
    assert (tmp_path / f"run/debug/step-{last + 1:08d}/report.json").exists()
    assert f"committed step {last}\n" in said
    assert f"step {last + 1}: loss " in said


def without_holdout(recipe_file) -> dict:
    data = yaml.safe_load(recipe_file("other").read_text())["data"]
    return {"train": data["train"]}
