"""The model card: what the Hub reads, what a person reads, and nothing private."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from finetune.package.card import figures, record
from finetune.package.card.card import card
from finetune.package.card.facts import Facts
from finetune.package.card.reported import CHOSEN, Reported, told
from finetune.plan.pinned import PinnedSet
from finetune.plan.plan import Counts, PinnedBase, PinnedSource, Plan
from finetune.plan.split import Seen
from finetune.recipe.schema import Recipe
from finetune.recipe.schema.tasks import CROSS_ENTROPY
from finetune.store.checkpoints.manifest import Manifest
from finetune.store.run import scan

HOME = "/home/planted-user"
COUNTS = Counts(
    rows=40, examples=40, tokens=1200, supervised_tokens=300, cut_rows=0, cut_tokens=0, left_out_rows=0, longest=60
)
FIGURES = (
    {"kind": "event", "event": "evaluated", "step": 0, "loss": 3.0, "perplexity": 20.0855, "rows": 8, "tokens": 90},
    {"kind": "step", "step": 1, "loss": 2.9, "tokens": 500, "supervised_tokens": 50},
    {"kind": "step", "step": 2, "loss": 2.5, "tokens": 700, "supervised_tokens": 70},
    {"kind": "event", "event": "evaluated", "step": 2, "loss": 2.0, "perplexity": 7.3891, "rows": 8, "tokens": 90},
)


def facts(
    base: dict | None = None, source: dict | None = None, pin: PinnedBase | None = None, **sections: object
) -> Facts:
    recipe = Recipe.model_validate(
        {
            "base": base or {"checkpoint": f"{HOME}/models/tiny"},
            "task": {"name": "chat"},
            "data": {"train": [source or {"path": f"{HOME}/secret/train.jsonl"}]},
            "adapter": {"name": "lora"},
            "optimizer": {"learning_rate": 0.01},
            "train": {"steps": 2},
            **sections,
        }
    )
    place = recipe.data.train[0].dataset or recipe.data.train[0].path
    plan = Plan(
        recipe=recipe,
        base=pin or PinnedBase(kind="directory", revision=None, digest="blake3:ba5e"),
        train=(
            PinnedSource(
                name=place,
                revision="c0ffee" if recipe.data.train[0].dataset else None,
                fingerprint="blake3:da7a",
                rows=40,
            ),
        ),
        holdout=(),
        encoding="sha256:0",
        counts=COUNTS,
        holdout_counts=COUNTS,
        sizes=(40,),
        steps=2,
        warmup_steps=0,
        total_parameters=10,
        trainable_parameters=5,
    )
    manifest = Manifest(
        run="1234",
        attempt="a",
        step=2,
        parent=None,
        plan_id=plan.plan_id,
        versions={"torch": "2.13.0"},
        digest="blake3:5678",
    )
    return Facts(
        plan,
        manifest,
        FIGURES,
        ({"name": "logits", "message": "a|b"},),
        "merged",
        "bf16",
        {"license": "apache-2.0"},
        "apache-2.0",
        (None,),
    )


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_base_on_the_hub_is_named_with_its_pin() -> None:
    pin = PinnedBase(kind="hub", revision="abc123", digest=None)
    text = card(facts({"checkpoint": "owner/base@main"}, pin=pin))
    metadata = front_matter(text)
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("owner/base", "finetune")
    assert (metadata["license"], metadata["library_name"], metadata["pipeline_tag"]) == (
        "apache-2.0",
        "transformers",
        "text-generation",
    )
    assert "[owner/base](https://huggingface.co/owner/base) at revision `abc123`" in text


def test_a_local_base_is_left_out_of_the_front_matter_and_named_in_the_text() -> None:
    text = card(facts())
    assert not {"base_model", "base_model_relation"} & front_matter(text).keys()
    assert "LoRA of the local checkpoint `tiny` (`blake3:ba5e`)" in text


def test_a_declared_origin_counts_as_the_base_and_is_said_to_be_declared() -> None:
    text = card(facts({"checkpoint": f"{HOME}/tiny", "origin": "owner/tiny"}))
    assert front_matter(text)["base_model"] == "owner/tiny"
    assert "The base was a local checkpoint that the recipe declares equal to `owner/tiny`." in text


def test_held_out_rows_that_were_trained_on_are_counted_beside_the_figures() -> None:
    seen = (Seen(by="one@4", rows=8), Seen(by="two@9", rows=None, why=f"{HOME}/rows.jsonl: no such file"))
    text = card(replace(facts(), seen=seen)).partition("## Figures")[2].partition("## How to use it")[0]
    assert "**8 of 40 held-out rows are training rows of one@4.**" in text
    assert "**whether two@9 trained on held-out rows cannot be checked: rows.jsonl: no such file.**" in text
    assert "Held-out figures are better on such rows than on new ones." in text
    assert "trained on by" not in card(facts())


def test_an_adapter_alone_is_one_for_peft() -> None:
    text = card(
        replace(facts({"checkpoint": "x/y"}, pin=PinnedBase(kind="hub", revision="r", digest=None)), form="adapter")
    )
    metadata = front_matter(text)
    assert (metadata["library_name"], metadata["base_model_relation"]) == ("peft", "adapter")
    assert "AutoPeftModelForCausalLM" in text


def test_an_unknown_licence_is_left_out_and_said_to_be_unknown() -> None:
    text = card(replace(facts(), licence=None))
    assert "license" not in front_matter(text)
    assert "The licence is not known" in text


def test_data_sets_of_the_hub_are_listed_with_their_revision() -> None:
    text = card(facts(source={"dataset": "owner/rows"}))
    assert front_matter(text)["datasets"] == ["owner/rows"]
    assert "at revision `c0ffee`, split `train`: 40 rows, licence not stated by its card, content `blake3:da7a`" in text


def test_figures_of_base_and_checkpoint_stand_side_by_side() -> None:
    text = card(facts())
    assert "| held-out loss (nats per token) | 3.0000 | 2.0000 |" in text
    assert "Trained for 2 steps on 1,200 tokens, of them 120 with a loss." in text
    without = card(replace(facts(), figures=FIGURES[1:3]))
    assert "No rows were held out." in without


def test_a_bar_in_a_message_does_not_break_its_table() -> None:
    assert "| logits | a\\|b |" in card(facts())


def test_no_folder_of_this_machine_is_in_a_card() -> None:
    text = card(facts())
    assert "planted-user" not in text and "secret" not in text
    assert "train.jsonl" in text


@pytest.mark.parametrize("adapter", [None, {"name": "lora"}, {"name": "frozen", "freeze": ["model.*"]}])
def test_the_same_facts_give_the_same_bytes(adapter) -> None:
    assert card(facts(adapter=adapter)) == card(facts(adapter=adapter))


@pytest.mark.slow
def test_a_loss_curve_has_no_date_and_the_same_bytes_each_time() -> None:
    curve = record.loss_curve(list(FIGURES))
    assert curve == record.loss_curve(list(FIGURES))
    assert curve.startswith(b"\x89PNG") and b"tEXt" not in curve and b"tIME" not in curve


def test_figures_keep_the_last_record_of_a_step_and_numbers_only(tmp_path) -> None:
    step = {"kind": "step", "step": 1, "attempt": "a", "time": "now", "seconds": 1.5}
    records = [
        {**step, "loss": 9.0},
        {**step, "loss": 2.0},
        {**step, "step": 2},
        {"kind": "event", "event": "started", "step": 0, "world": {}},
    ]
    (tmp_path / "journal.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in records))
    assert record.figures(scan.read(tmp_path), 1) == [{"kind": "step", "step": 1, "seconds": 1.5, "loss": 2.0}]


def test_a_card_is_made_without_torch() -> None:
    code = "import finetune.package.card.card, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_held_out_data_set_of_the_hub_has_its_result_in_the_hubs_own_form() -> None:
    from huggingface_hub._eval_results import parse_eval_result_entries

    one = facts(data={"train": [{"path": "train.jsonl"}], "holdout": [{"dataset": "owner/test", "name": "hard"}]})
    pinned = PinnedSource(name="owner/test", revision="c0ffee", fingerprint="blake3:0", rows=8)
    plan = one.plan.model_copy(update={"holdout": (pinned,)})
    records = [*FIGURES[:-1], FIGURES[-1] | {"loss_stderr": 0.1}]
    (entry,) = parse_eval_result_entries(figures.eval_results(records, 2, plan))
    assert (entry.dataset_id, entry.task_id, entry.dataset_revision, entry.value) == (
        "owner/test",
        "hard",
        "c0ffee",
        2.0,
    )
    assert entry.notes == "held-out loss, nats per token: 2.0000 (1.8040 to 2.1960)"
    assert figures.eval_results(records, 2, facts().plan) == [] == figures.eval_results(records, 1, plan)


def test_figures_have_intervals_where_the_record_has_errors() -> None:
    records = [*FIGURES[:-1], FIGURES[-1] | {"loss_stderr": 0.1}]
    text = figures.shown(records, 2, CROSS_ENTROPY)
    assert "| held-out loss (nats per token) | 3.0000 | 2.0000 (1.8040 to 2.1960) |" in text
    assert "| held-out perplexity | 20.0855 | 7.3891 (6.0739 to 8.9890) |" in text and "95 % interval" in text
    assert "interval" not in figures.shown(FIGURES, 2, CROSS_ENTROPY)
    grown = figures.shown([*FIGURES[:-1], FIGURES[-1] | {"loss": "inf", "perplexity": "inf"}], 2, CROSS_ENTROPY)
    assert "| 3.0000 | inf |" in grown


def reported(**more: object) -> Reported:
    """The evaluation of step 2 on a test set of 30 rows."""
    measured = {"rows": 30, "tokens": 400, "perplexity": 7.0}
    return Reported("final", {**measured, "loss": 3.1}, {**measured, "loss": 2.2, "loss_stderr": 0.1}, **more)


def chosen(**sections: object) -> Facts:
    """Facts of a run that chooses among its checkpoints."""
    data = {"train": [{"path": "train.jsonl"}], "holdout": 8}
    one = facts(evaluate={"every": "1 steps"}, data=data, **sections)
    return replace(one, plan=one.plan.model_copy(update={"holdout_counts": COUNTS.model_copy(update={"rows": 8})}))


def test_figures_on_a_test_set_take_the_place_of_the_held_out_ones() -> None:
    one, own = chosen(), reported()
    said = card(replace(one, figures=[*FIGURES, *own.records(one.plan, 2)], report=own))
    assert "| held-out loss (nats per token) | 3.1000 | 2.2000 (2.0040 to 2.3960) |" in said and "2.0000" not in said
    assert "Chosen on 8 held-out rows, reported on 30 other rows (`final`, 400 tokens with a loss) that no" in said
    seen = replace(own, seen=(Seen(by="one@4", rows=3),))
    said = card(replace(one, figures=[*FIGURES, *seen.records(one.plan, 2)], report=seen, seen=seen.seen))
    assert "**3 of 30 held-out rows are training rows of one@4.**" in said


def test_a_card_says_where_its_checkpoint_may_be_chosen_by_its_own_rows() -> None:
    assert CHOSEN in card(chosen()) and CHOSEN not in card(facts())
    by_docs = {"keep": {"best": {"metric": "docs/loss"}}}
    sets = {"every": "1 steps", "sets": {"docs": [{"path": "docs.jsonl"}]}}
    one = facts(evaluate=sets, checkpoint=by_docs, data={"train": [{"path": "train.jsonl"}], "holdout": 8})
    assert CHOSEN not in card(one)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"chosen": {}}, "Reported on 30 rows (`final`, 400 tokens with a loss) that no choice has seen."),
        ({"chosen": {"docs": 1}}, "Chosen on 1 row of `docs`, reported on 30 other rows (`final`, 400 "),
        ({"earlier": 2}, "2 other checkpoints of the run were evaluated on these rows before, so a choice may have"),
    ],
)
def test_the_sentence_about_a_test_set_fits_what_was_chosen(more, said) -> None:
    (_, event) = reported().records(chosen().plan, 2)
    assert said in told({**event, **more})


def test_a_figure_that_is_not_finite_is_a_word_of_the_record() -> None:
    (event,) = replace(reported(), base=None, own={"rows": 3, "tokens": 9, "loss": float("nan")}).records(
        facts().plan, 2
    )
    assert event["loss"] == "nan" and "| not evaluated | nan |" in figures.shown([event], 2, {"loss": "loss"})


def test_a_test_set_on_the_hub_has_its_result_in_the_hubs_own_form() -> None:
    evaluate = {"every": "1 steps", "sets": {"final": [{"dataset": "owner/final"}]}, "test_set": "final"}
    one = facts(evaluate=evaluate, data={"train": [{"path": "train.jsonl"}], "holdout": [{"dataset": "owner/test"}]})
    pinned = PinnedSource(name="owner/final", revision="f00d", fingerprint="blake3:0", rows=30)
    plan = one.plan.model_copy(
        update={"sets": (PinnedSet(name="final", sources=(pinned,), counts=COUNTS, contents="0"),)}
    )
    records = [*FIGURES, *reported().records(plan, 2)]
    (entry,) = figures.eval_results(records, 2, plan)
    assert (entry["dataset"]["id"], entry["dataset"]["revision"], entry["value"]) == ("owner/final", "f00d", 2.2)
