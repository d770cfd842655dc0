"""What people write into a card stays when it is written again, wherever they write it; a change in the generated part is noticed."""

import pytest

from finetune.package.card.notes import NOTES_BEGIN, NOTES_END, marked, with_text_of

PLAIN = "---\nlicense: mit\ntags:\n- finetune\n---\n\n# A model\n\nTrained.\n\n" + f"{NOTES_BEGIN}\n{NOTES_END}\n"
CARD = marked(PLAIN)
NEW = marked(PLAIN.replace("Trained.", "Trained again.").replace("- finetune", "- finetune\n- lora"))


def test_a_card_that_was_not_touched_becomes_the_new_one() -> None:
    assert with_text_of(CARD, NEW) == (NEW, False)
    assert with_text_of(NEW, NEW) == (NEW, False)


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (NOTES_END, f"In the notes.\n{NOTES_END}"),
        (f"{NOTES_END}\n", f"{NOTES_END}\n\n## Below\n\nThe end marker.\n"),
        ("---\n\n<!-- card", "---\n\n> Above all.\n\n<!-- card"),
    ],
    ids=["notes", "below", "above"],
)
def test_text_outside_the_generated_part_stays_and_is_no_edit(place, text) -> None:
    edited = CARD.replace(place, text)
    assert edited != CARD
    merged, is_lost = with_text_of(edited, NEW)
    assert merged == NEW.replace(place, text) and not is_lost
    assert with_text_of(merged, NEW) == (merged, False), "the second publish changes nothing"


def test_keys_and_tags_that_people_added_to_the_front_matter_stay() -> None:
    edited = CARD.replace("- finetune\n", "- finetune\n- poetry\nlanguage: en\n")
    merged, is_lost = with_text_of(edited, NEW)
    assert not is_lost
    assert merged.startswith("---\nlicense: mit\ntags:\n- finetune\n- lora\n- poetry\nlanguage: en\n---\n")
    assert merged.partition("\n---\n")[2] == NEW.partition("\n---\n")[2]
    assert with_text_of(merged, NEW) == (merged, False)


@pytest.mark.parametrize(
    ("place", "text"), [("Trained.", "Trained by me."), ("license: mit", "license: cc0-1.0")], ids=["text", "key"]
)
def test_a_change_in_what_is_written_again_is_noticed(place, text) -> None:
    assert with_text_of(CARD.replace(place, text), NEW) == (NEW, True)


def test_a_card_of_an_earlier_version_keeps_its_notes_and_what_is_below() -> None:
    old = PLAIN.replace(NOTES_END, f"Mind the gap.\n{NOTES_END}") + "\nBelow.\n"
    merged, is_lost = with_text_of(old, NEW)
    assert merged == NEW.replace(NOTES_END, f"Mind the gap.\n{NOTES_END}") + "\nBelow.\n" and not is_lost


def test_a_card_of_somebody_is_lost_but_not_one_that_only_states_the_same_licence() -> None:
    assert with_text_of("# By hand\n", NEW) == (NEW, True)
    assert with_text_of("---\nlicense: mit\n---\n", NEW) == (NEW, False)
    assert with_text_of("---\nlicense: cc0-1.0\n---\n", NEW) == (NEW, True)
