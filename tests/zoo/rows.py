"""13 kinds of chat rows. Each text is found in one place only, so that what is lost or in the wrong place can be told."""

from typing import Any

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather_at",
            "description": "Tells the weather of a place",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string", "description": "A village"}},
                "required": ["place"],
            },
        },
    }
]


def _system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str | None, **fields: object) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def _call(number: int, place: str, is_text: bool = False) -> dict[str, Any]:
    arguments: object = f'{{"place": "{place}"}}' if is_text else {"place": place}
    return {
        "id": f"call{number:05}",
        "type": "function",
        "function": {"name": "weather_at", "arguments": arguments},
    }


def _result(number: int, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call{number:05}", "name": "weather_at", "content": text}


ROWS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [_user("How tall is Kibo?"), _assistant("Rather tall.")]},
    "two turns": {
        "messages": [_user("Who sang first?"), _assistant("A blackbird."), _user("And then?"), _assistant("The wren.")]
    },
    "system + turns": {
        "messages": [
            _system("Answer in rhyme."),
            _user("Is it late?"),
            _assistant("Late is fate."),
            _user("Go on!"),
            _assistant("Wait, mate."),
        ]
    },
    "several system messages": {
        "messages": [
            _system("Speak softly."),
            _user("Where do owls live?"),
            _assistant("In barns."),
            _system("Now speak loudly."),
            _user("Where do crabs live?"),
            _assistant("ON SHORES."),
        ]
    },
    "reasoning": {
        "messages": [
            _user("What is 17 + 25?"),
            _assistant("It is 42.", reasoning_content="Ten and twenty are thirty, seven and five twelve."),
        ]
    },
    "reasoning, two turns": {
        "messages": [
            _user("What is 6 x 7?"),
            _assistant("Forty-two.", reasoning_content="Six sevens: I know them."),
            _user("And half of it?"),
            _assistant("Twenty-one.", reasoning_content="Halve forty, halve two."),
        ]
    },
    "<think> in content, two turns": {
        "messages": [
            _user("Is 91 prime?"),
            _assistant("<think>\nSeven thirteens make it.\n</think>\n\nNot prime."),
            _user("Is 97?"),
            _assistant("<think>\nNothing up to nine divides.\n</think>\n\nPrime."),
        ]
    },
    "tool call": {
        "tools": TOOLS,
        "messages": [
            _user("Does it rain in Ulm?"),
            _assistant(None, tool_calls=[_call(1, "Ulm on the Danube")]),
            _result(1, "dry, 14 degrees"),
            _assistant("No, it is dry there."),
        ],
    },
    "parallel calls": {
        "tools": TOOLS,
        "messages": [
            _user("Compare two villages."),
            _assistant("Let me look both up.", tool_calls=[_call(1, "Murren"), _call(2, "Gimmelwald")]),
            _result(1, "snow on the roofs"),
            _result(2, "fog in the woods"),
            _assistant("One has snow, one has fog."),
        ],
    },
    "arguments as text": {
        "tools": TOOLS,
        "messages": [
            _user("Is Bern warm?"),
            _assistant(None, tool_calls=[_call(1, "Bern by the Aare", is_text=True)]),
            _result(1, "warm, 26 degrees"),
            _assistant("Very warm."),
        ],
    },
    "begins with the assistant": {
        "messages": [_assistant("Welcome to the zoo."), _user("Where are the bears?"), _assistant("Behind the oaks.")]
    },
    "ends with the user": {"messages": [_user("Name a river."), _assistant("The Tweed."), _user("Many thanks, bye.")]},
    "turns in a row": {
        "messages": [
            _user("First question here."),
            _user("Second one there."),
            _assistant("A draft to skip.", weight=0),
            _assistant("The proper reply."),
        ]
    },
}

MORE: dict[str, dict[str, Any]] = {
    "prompt and completion": {"prompt": "Name a bird.", "completion": "A heron."},
    "lists as prompt and completion": {
        "prompt": [_user("Name a fish."), _assistant("A perch."), _user("One more.")],
        "completion": [_assistant("A pike.")],
    },
    "system column": {"system": "Be terse.", "messages": [_user("Name a tree."), _assistant("An elm.")]},
    "three turns": {
        "messages": [
            *(_user("Count one."), _assistant("Uno.")),
            *(_user("Count two."), _assistant("Due.")),
            *(_user("Count three."), _assistant("Tre.")),
        ]
    },
    "two turns, ends with the user": {
        "messages": [
            *(_user("Who painted it?"), _assistant("Vermeer.")),
            *(_user("In which town?"), _assistant("Delft.")),
            _user("I see."),
        ]
    },
    "tools without a call": {"tools": TOOLS, "messages": [_user("Say hello."), _assistant("Hello there.")]},
    "ends with a call": {
        "tools": TOOLS,
        "messages": [_user("Is Chur sunny?"), _assistant(None, tool_calls=[_call(1, "Chur on the Rhine")])],
    },
    "a thought before a call": {
        "tools": TOOLS,
        "messages": [
            _user("Is Thun cold?"),
            _assistant(None, tool_calls=[_call(1, "Thun by the lake")], reasoning_content="I have to look it up."),
            _result(1, "cold, minus 3"),
            _assistant("Bitterly cold.", reasoning_content="Minus three is cold."),
        ],
    },
    "two chains of calls": {
        "tools": TOOLS,
        "messages": [
            _user("Is Visp dry?"),
            _assistant(None, tool_calls=[_call(1, "Visp in the valley")]),
            _result(1, "dust everywhere"),
            _assistant("Dry as dust."),
            _user("And Brig?"),
            _assistant(None, tool_calls=[_call(2, "Brig at the pass")]),
            _result(2, "drizzle since noon"),
            _assistant("Drizzling."),
        ],
    },
    "a thought in some turns": {
        "messages": [
            *(_user("What is 3 x 9?"), _assistant("27.", reasoning_content="Three nines.")),
            *(_user("Thanks!"), _assistant("With pleasure.")),
            *(_user("What is 4 x 9?"), _assistant("36.", reasoning_content="Four nines.")),
        ]
    },
    "a thought of a turn not learnt": {
        "messages": [
            _user("What is 5 x 9?"),
            _assistant("Forty-six.", reasoning_content="Five nines, badly counted.", weight=0),
            _user("Sure?"),
            _assistant("Forty-five.", reasoning_content="Five nines, well counted."),
        ]
    },
    "an empty thought": {"messages": [_user("Ready?"), _assistant("Ready.", reasoning_content="")]},
    "blanks around": {
        "messages": [_user("  Well?\n"), _assistant("  Quite well.  \n"), _user("Oh."), _assistant("\n\nYes.")]
    },
    "names": {"messages": [{**_user("Who am I?"), "name": "Ottilie"}, _assistant("You are you.")]},
    "a turn of many scripts": {"messages": [_user("Grüße – 你好 🙂?"), _assistant("Ça va, наконец 🙃.")]},
}
"""Further rows, that the long form tries."""
