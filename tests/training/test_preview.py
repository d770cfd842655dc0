"""`plan` says how much of each source is drawn, and how the learning rate goes."""

import json

from finetune.plan.disk import readable, state_bytes
from finetune.recipe.load import load
from finetune.training.preview import preview
from tests.conftest import chat_row


def shown(path, tmp_path):
    return preview(load(path), tmp_path / "run", lambda resolved: None)


def test_plan_shows_what_is_drawn_of_each_source(recipe_file, chat_data, tmp_path):
    sources = [
        {"path": str(chat_data / "train.jsonl"), "epochs": 0.5},
        {"path": str(chat_data / "holdout.jsonl"), "epochs": 3},
    ]
    optimizer = {"learning_rate": 0.01, "min_learning_rate": "10%", "warmup": 2}
    train = {"epochs": 2, "batch_size": 4, "precision": "fp32"}
    found = shown(recipe_file(data={"train": sources}, optimizer=optimizer, train=train), tmp_path)
    facts = found.facts
    assert facts["steps"] == 22 and facts["steps_per_epoch"] == 11
    amounts = [(one["examples"], one["examples_per_epoch"], one["epochs"]) for one in facts["mixture"]]
    assert amounts == [(40, 20, 1.0), (8, 24, 6.0)]
    lengths, sizes = found.resolved.train.lengths, found.resolved.train.sizes
    drawn = [int(lengths[:40].sum()), 6 * int(lengths[40:].sum())]
    assert facts["tokens"] == sum(drawn) and facts["mixture"][0]["token_share"] == drawn[0] / sum(drawn)
    assert sizes == (40, 8) and facts["tokens_per_epoch"] == round(sum(drawn) / 2)
    lines = found.text.splitlines()
    assert "order      shuffled" in lines
    assert any(
        line.endswith(
            f"holdout.jsonl  24 examples an epoch, 6 epochs of it in all, {drawn[1] / sum(drawn):.1%} of the tokens"
        )
        for line in lines
    )
    assert "rate       0.01 after 2 steps of warm-up, then cosine; 0.00106 in the last step" in lines


def test_plan_does_not_speak_of_the_order_of_one_shuffled_source(recipe_file, chat_data, tmp_path):
    found = shown(recipe_file(data={"train": [{"path": str(chat_data / "train.jsonl")}]}), tmp_path)
    assert not any(line.startswith("order") for line in found.text.splitlines())
    assert found.facts["tokens_per_epoch"] == found.resolved.plan.counts.tokens


def test_plan_says_which_rows_choose_and_which_are_for_the_card(recipe_file, tmp_path):
    texts = {"docs": range(100, 106), "final": range(110, 120)}
    for name, numbers in texts.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(chat_row(number)) + "\n" for number in numbers))
    sets = {name: [{"path": str(tmp_path / f"{name}.jsonl")}] for name in texts}
    checkpoint = {"every": "4 steps", "keep": {"best": {"metric": "docs/loss"}}}
    found = shown(recipe_file(evaluate={"sets": sets, "test_set": "final"}, checkpoint=checkpoint), tmp_path)
    assert [(each["name"], each["is_test_set"]) for each in found.facts["sets"]] == [("docs", False), ("final", True)]
    assert found.facts["choosing_rows"] == {"docs": 6}
    lines = found.text.splitlines()
    assert "checkpoints are chosen by 6 docs rows" in lines
    assert "test set final: 10 rows, for the card of a package alone" in lines
    plain = shown(recipe_file(evaluate={"sets": sets}, checkpoint=checkpoint), tmp_path)
    assert plain.resolved.plan.plan_id == found.resolved.plan.plan_id
    alone = shown(recipe_file(checkpoint={"every": "4 steps"}), tmp_path)
    assert alone.facts["choosing_rows"] == {} and "chosen" not in alone.text


def test_plan_says_where_the_mirror_is_and_what_it_sends_and_keeps(recipe_file, tmp_path):
    def line(mirror):
        found = shown(recipe_file(mirror=mirror), tmp_path)
        lines = [line for line in found.text.splitlines() if line.startswith("mirror")]
        return found, lines

    found, lines = line({"to": "file:///mnt/{run}"})
    sent = readable(found.facts["mirror"]["commit_bytes"])
    assert lines == [f"mirror     file:///mnt/run: {sent} a commit; copies every commit; keeps the last 2, the best"]
    keep = {"last": 1, "best": {"count": 3, "metric": "perplexity"}, "every": "500 steps"}
    found, lines = line({"to": "file:///mnt/a", "every": "50 steps", "keep": keep})
    assert lines[0].endswith(
        "copies every 50 steps, and the last; keeps the last, the best 3 by perplexity, every 500 steps"
    )
    # tensors and the small files beside them
    assert state_bytes(found.resolved.plan) < found.facts["mirror"]["commit_bytes"] < found.facts["run_bytes"]
    found, lines = line(None)
    assert lines == [] and found.facts["mirror"] is None
