"""Conversations are taken whole: openings, ends, several system messages, calls without text, and turns that are not learnt."""

import pytest

from finetune.data.conversation import conversation_of
from finetune.data.roles import ALIASES, with_known_roles
from finetune.data.shapes import SHAPES
from finetune.errors import DataError

LETTERS = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def turns(roles: str, **fields: object) -> dict:
    return {"messages": [{"role": LETTERS[role], "content": f"{role}{place}"} for place, role in enumerate(roles)]}


@pytest.mark.parametrize(
    ("roles", "learnt"),
    [
        ("ua", [1]),
        ("uaua", [1, 3]),
        ("suaau", [2, 3]),
        ("uau", [1]),
        ("ssua", [3]),
        ("suasua", [2, 5]),
        ("uuua", [3]),
        ("uaa", [1, 2]),
        ("uata", [1, 3]),
        ("aua", [2]),
        ("aauau", [3]),
        ("auaua", [2, 4]),
        ("saua", [1, 3]),
    ],
)
def test_an_opening_turn_of_the_assistant_is_context_and_all_others_are_learnt(roles, learnt) -> None:
    conversation = conversation_of(turns(roles), "rows:1")
    assert conversation.turns == learnt
    assert "".join(message["role"][0] for message in conversation.messages) == roles


@pytest.mark.parametrize("roles", ["a", "aa", "au", "aau"])
def test_an_opening_turn_alone_is_refused(roles) -> None:
    with pytest.raises(DataError, match="begins with an assistant turn, which answers nothing"):
        conversation_of(turns(roles), "rows:1")


def test_runs_of_older_rules_refuse_every_opening_turn() -> None:
    with pytest.raises(DataError, match="begins with an assistant turn"):
        conversation_of(turns("aua"), "rows:1", row_rules=1)


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss": False}, {"learn": False}, {"loss": 0}])
def test_a_turn_may_say_that_it_is_not_learnt(flag) -> None:
    row = turns("uaua")
    row["messages"][1] |= flag
    conversation = conversation_of(row, "rows:1")
    assert conversation.turns == [3] and conversation.messages[1] == {"role": "assistant", "content": "a1"}
    row["messages"][3] |= flag
    with pytest.raises(DataError, match="has no assistant turn to learn"):
        conversation_of(row, "rows:1")


def test_flags_that_make_no_sense_are_refused_by_name() -> None:
    for number, flag, message in [
        (0, {"loss": True}, r"`messages\[0\].loss` asks to learn a user message"),
        (1, {"learn": "yes"}, r"`messages\[1\].learn` must be true or false, not text"),
        (1, {"weight": 0.5}, r"`messages\[1\].weight` must be 0 or 1, not 0.5"),
    ]:
        row = turns("ua")
        row["messages"][number] |= flag
        with pytest.raises(DataError, match=message):
            conversation_of(row, "rows:1")


def test_parallel_calls_without_text_are_one_turn_of_the_assistant() -> None:
    calls = [{"type": "function", "function": {"name": name, "arguments": "{}"}} for name in "fg"]
    row = turns("uaa")
    row["messages"][1] |= {"content": None, "tool_calls": calls}
    conversation = conversation_of(SHAPES["messages"].canonical(row, "rows:1"), "rows:1")
    assert [call["function"]["name"] for call in conversation.messages[1]["tool_calls"]] == ["f", "g"]
    assert conversation.turns == [1, 2] and conversation.messages[1]["content"] == ""


def test_every_name_of_a_role_leads_to_one_that_templates_know() -> None:
    assert {*ALIASES.values()} == {*LETTERS.values()} and all(name == name.lower() for name in ALIASES)
    assert all(ALIASES[role] == role for role in LETTERS.values())


def test_a_role_that_the_template_names_stays_and_none_becomes_the_assistants() -> None:
    row = {
        "messages": [{"role": role, "content": "x"} for role in ("developer", "user", "assistant", "function", "gpt")]
    }
    conversation = conversation_of(SHAPES["messages"].canonical(row, "rows:1"), "rows:1")
    for known, expected in [("", "system user assistant tool gpt"), ("developer", "developer user assistant tool gpt")]:
        messages = with_known_roles(conversation, lambda role, known=known: role == known).messages
        assert " ".join(message["role"] for message in messages) == expected
