"""The command line's contract: exit codes, what goes where, what is said."""

import json
import sys

import pytest
from click.testing import CliRunner

from finetune.cli import cli, main
from finetune.store.run.directory import RunDirectory


def run_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: object
) -> tuple[int, str, str]:
    """The console script in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["finetune", *map(str, arguments)])
    try:
        main()
        code = 0
    except SystemExit as request:
        code = request.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_recipe_error_has_all_problems_and_exit_code_2(monkeypatch, capsys, tmp_path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "base: {checkpoint: a/b}\ntask: {name: chad}\ndata: {train: [{path: x.jsonl}]}\noptimizer: {learning_rat: 1e-4}\n"
    )
    code, out, err = run_main(monkeypatch, capsys, "plan", recipe)
    assert (code, out) == (2, "")
    assert f"{recipe}:2: task.name: " in err
    assert f"{recipe}:4: optimizer.learning_rat: " in err
    assert "learning_rate" in err


def test_with_json_an_error_is_an_object_on_stdout(monkeypatch, capsys, tmp_path) -> None:
    code, out, err = run_main(monkeypatch, capsys, "log", tmp_path / "nothing", "--json")
    error = json.loads(out)["error"]
    assert code == 1
    assert error == {
        "code": "run",
        "message": "is not a run directory: it has no plan.json",
        "where": str(tmp_path / "nothing"),
        "hint": "start it with `finetune train`",
    }
    assert "hint: start it with `finetune train`" in err


def test_usage_errors_have_exit_code_2(monkeypatch, capsys) -> None:
    code, out, err = run_main(monkeypatch, capsys, "train")
    assert (code, out) == (2, "")
    assert "Missing argument 'RECIPE'" in err


def test_a_bug_keeps_its_traceback(monkeypatch, capsys, tmp_path) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("finetune.store.run.inspect.log", broken)
    with pytest.raises(ZeroDivisionError):
        run_main(monkeypatch, capsys, "log", tmp_path)


def test_the_story_of_a_run(recipe_file, train, monkeypatch, capsys, tmp_path) -> None:
    recipe = recipe_file(checkpoint={"every": "4 steps", "keep": {"last": 2, "best": 1}})
    run = train(recipe, tmp_path / "run")
    capsys.readouterr()

    code, out, _ = run_main(monkeypatch, capsys, "plan", recipe, "--json")
    plan = json.loads(out)
    assert code == 0
    assert {
        "plan_id",
        "steps",
        "rows",
        "tokens",
        "trainable_parameters",
        "checkpoint_bytes",
        "memory_bytes",
    } <= plan.keys()
    assert (plan["steps"], plan["rows"], plan["holdout_rows"]) == (10, 40, 8)

    code, out, _ = run_main(monkeypatch, capsys, "log", run, "--json")
    checkpoints = json.loads(out)["checkpoints"]
    assert [checkpoint["step"] for checkpoint in checkpoints] == [8, 10]
    assert {"ref", "step", "path", "kind", "metrics", "parent"} <= checkpoints[0].keys()
    assert checkpoints[1]["parent"]["ref"] == "run@8"
    assert json.loads((run / "plan.json").read_text())["plan_id"] == plan["plan_id"]

    code, out, _ = run_main(monkeypatch, capsys, "show", f"{run}@best", "--json")
    assert json.loads(out)["metrics"]["loss"] == min(checkpoint["metrics"]["loss"] for checkpoint in checkpoints)

    code, out, _ = run_main(monkeypatch, capsys, "evaluate", f"{run}@0", f"{run}@last", "--again", "--json")
    base, tuned = (result["metrics"]["loss"] for result in json.loads(out)["results"])
    assert tuned == checkpoints[1]["metrics"]["loss"]
    assert base > tuned

    code, out, _ = run_main(
        monkeypatch, capsys, "generate", f"{run}@last", "--prompt", "the model", "--max-new-tokens", 5, "--json"
    )
    assert json.loads(out)["results"][0]["ref"] == f"{run}@last"

    assert run_main(monkeypatch, capsys, "verify", run)[:2] == (0, "every byte is as it was committed\n")
    file = run / "checkpoints/step-00000010/optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.chmod(0o644)
    file.write_bytes(content)
    code, out, _ = run_main(monkeypatch, capsys, "verify", run, "--json")
    report = json.loads(out)
    assert (code, report["ok"]) == (1, False)
    assert report["problems"][0]["file"] == "checkpoints/step-00000010/optimizer.safetensors"
    assert "lora_" in report["problems"][0]["tensor"]
    code, _, err = run_main(monkeypatch, capsys, "evaluate", f"{run}@last", "--again")
    assert (code, "optimizer.safetensors" in err) == (1, True)


@pytest.mark.slow
def test_train_on_a_run_of_another_recipe_refuses_and_names_every_difference(
    recipe_file, train, monkeypatch, capsys, tmp_path
) -> None:
    run = train(recipe_file(), tmp_path / "run")
    changed = ["--set", "optimizer.learning_rate=0.02", "--set", "train.seed=3", "--set", "checkpoint.every=2 steps"]
    code, _, err = run_main(monkeypatch, capsys, "train", recipe_file(), "--run", run, *changed)
    assert code == 1
    assert "  optimizer.learning_rate: 0.01 -> 0.02\n  train.seed: 0 -> 3\n" in err
    assert "checkpoint.every" not in err
    assert "finetune branch" in err


@pytest.mark.slow
def test_what_may_change_on_resume_is_taken_and_recorded(recipe_file, train, capsys, tmp_path) -> None:
    from finetune.store.run import journal

    run = train(recipe_file(), tmp_path / "run")
    capsys.readouterr()
    train(recipe_file(), run, "checkpoint.every=2 steps", "train.micro_batch_tokens=256")
    said = capsys.readouterr().err
    assert "taken from the recipe: checkpoint.every[0]: 4 steps -> 2 steps" in said
    assert "micro_batch_tokens changed: 128 -> 256; bit equality may be lost" in said
    assert str(RunDirectory(run).plan()[0].recipe.checkpoint.every[0]) == "2 steps"
    started = [record for record in journal.read(run) if record.get("event") == "started"]
    assert len(started[-1]["changes"]) == 3


def test_every_command_has_help_and_documented_options() -> None:
    for name, command in cli.commands.items():
        result = CliRunner().invoke(cli, [name, "--help"])
        assert result.exit_code == 0
        assert command.help
        assert all(getattr(option, "help", True) for option in command.params if option.param_type_name == "option"), (
            name
        )


@pytest.mark.slow
def test_plan_names_ignored_columns_and_counts_what_is_cut(recipe_file, monkeypatch, capsys, tmp_path) -> None:
    rows = [{"prompt": "ask", "completion": "yes", "id": 1}] * 99 + [{"prompt": "ask", "completion": "y" * 80, "of": 2}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_file(data={"train": [{"path": str(file)}]})
    code, said, _ = run_main(monkeypatch, capsys, "plan", recipe)
    assert (code, said.splitlines()[-2]) == (0, f"ignored    columns `id`, `of` of {file}")
    warning = said.splitlines()[-1]
    assert warning.startswith("warning: task.max_length cuts 1 of 100 rows (1.0%), and with them ")
    facts = json.loads(run_main(monkeypatch, capsys, "plan", recipe, "--json")[1])
    assert facts["ignored_columns"] == [{"source": str(file), "columns": ["id", "of"]}]
    lost, of = facts["lost_supervised_tokens"], facts["source_supervised_tokens"]
    assert facts["source_rows"] == 100 and facts["lost_rows"] == 1 and of - lost == facts["supervised_tokens_per_epoch"]
    assert f" {lost} of {of} supervised tokens ({lost / of:.1%})" in warning
    assert warning in run_main(monkeypatch, capsys, "train", recipe, "--run", tmp_path / "run", "--until", "1")[2]
    skipping = recipe_file(
        data={"train": [{"path": str(file), "skip": ["id", "of"]}]}, task={"name": "chat", "max_length": 128}
    )
    said = run_main(monkeypatch, capsys, "plan", skipping)[1]
    assert "\nignored" not in said and "warning" not in said


def test_bad_rows_are_listed_in_the_object_of_an_error(recipe_file, monkeypatch, capsys, tmp_path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": ""}\n{"prompt": "a"}\n')
    code, said, _ = run_main(monkeypatch, capsys, "plan", recipe_file(data={"train": [{"path": str(file)}]}), "--json")
    rows = json.loads(said)["error"]["rows"]
    assert code == 1 and [row["where"] for row in rows] == [f"{file}:1", f"{file}:2"]
    assert rows[0]["message"] == "has an empty assistant turn"
