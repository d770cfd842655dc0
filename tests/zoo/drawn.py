"""Chat rows drawn by a number: roles, thoughts, calls, weights and blanks in any order that a row may have."""

import random
from typing import Any

from tests.zoo.rows import TOOLS

PLACES = ("Ulm", "Bern by the Aare", 'the "Old" Town', "São Tomé", "Ort {1}", "a\nb")


def row(number: int) -> dict[str, Any]:
    """Row `number`; each text in it has a number of its own, so that it is found in one place only."""
    chance = random.Random(number)
    texts = iter(range(1, 1000))

    def text(kind: str) -> str:
        said = f"{kind} {number}.{next(texts)}"
        return chance.choice(
            (said, said, said, f"{said}\n\n- and more", f"  {said} ", f"{said}\n", f"Grüße, {said} 🙂")
        )

    messages: list[dict[str, Any]] = []
    if chance.random() < 0.3:
        messages.append({"role": "system", "content": text("system")})
    has_tools = chance.random() < 0.4
    has_thoughts = chance.random() < 0.4
    is_within = has_thoughts and chance.random() < 0.4
    for _ in range(chance.randint(1, 4)):
        messages.append({"role": "user", "content": text("question")})
        if has_tools and chance.random() < 0.6:
            messages += _chain(chance, text, has_thoughts and not is_within)
        answer: dict[str, Any] = {"role": "assistant", "content": text("answer")}
        if has_thoughts and chance.random() < 0.7:
            thought = text("thought")
            if is_within:
                answer["content"] = f"<think>\n{thought.strip()}\n</think>\n\n{answer['content'].strip()}"
            else:
                answer["reasoning_content"] = thought
        if chance.random() < 0.15:
            answer["weight"] = 0
        messages.append(answer)
    if chance.random() < 0.1:
        messages.append({"role": "user", "content": text("last question")})
    if not any(message["role"] == "assistant" and message.get("weight") != 0 for message in messages):
        return row(number + 1_000_000)
    return {"messages": messages} | ({"tools": TOOLS} if has_tools else {})


def _chain(chance: random.Random, text: Any, has_thoughts: bool) -> list[dict[str, Any]]:
    """Calls and their results."""
    numbers = [f"{chance.randrange(10**9):09}" for _ in range(chance.choice((1, 1, 1, 2)))]
    calls = [
        {
            "id": number,
            "type": "function",
            "function": {"name": "weather_at", "arguments": {"place": f"{chance.choice(PLACES)} {number}"}},
        }
        for number in numbers
    ]
    turn: dict[str, Any] = {
        "role": "assistant",
        "content": chance.choice((None, text("remark"))),
        "tool_calls": calls,
    }
    if has_thoughts and chance.random() < 0.5:
        turn["reasoning_content"] = text("thought")
    results = [
        {"role": "tool", "tool_call_id": number, "name": "weather_at", "content": text("result")} for number in numbers
    ]
    return [turn, *results]
