"""Answers for a reader: lines that fit, and nothing that a terminal would act on."""

from finetune.compare.generate import Answer
from finetune.compare.side_by_side import listing, shown


def answer(
    ref: str, text: str, where: str = "rows.jsonl:1", sample: int = 0, prompt: object = "the question"
) -> Answer:
    return {
        "ref": ref,
        "prompt": prompt,
        "where": where,
        "sample": sample,
        "text": text,
        "tokens": 3,
        "is_stopped": True,
    }


def test_one_answer_is_printed_as_it_is() -> None:
    long = "word " * 40
    assert listing([answer("a", long)], 80) == long


def test_refs_stand_side_by_side_under_each_prompt() -> None:
    results = [
        answer("runs/a@0", "one two three"),
        answer("runs/a@best", "def f():\n    return 1"),
        answer("runs/a@0", "x", "rows.jsonl:2", prompt=[{"role": "user", "content": "hi"}]),
        answer("runs/a@best", "y", "rows.jsonl:2", prompt=[{"role": "user", "content": "hi"}]),
    ]
    assert listing(results, 40).splitlines() == [
        "=== rows.jsonl:1",
        "> the question",
        "",
        "--- runs/a@0         --- runs/a@best",
        "one two three        def f():",
        "                         return 1",
        "",
        "=== rows.jsonl:2",
        '> [{"role": "user", "content": "hi"}]',
        "",
        "--- runs/a@0         --- runs/a@best",
        "x                    y",
    ]


def test_no_line_is_wider_than_asked_also_in_wide_characters() -> None:
    from rich.cells import cell_len

    texts = ("日本語" * 60, "[bold]not markup[/bold] " * 9, "a" * 300)
    results = [answer(ref, text, prompt="問" * 200) for ref, text in zip("abc", texts, strict=True)]
    results += [answer(ref, "x", "rows.jsonl:2") for ref in "abc"]
    text = listing(results, 80)
    assert max(map(cell_len, text.splitlines())) <= 80
    assert "[bold]not markup[/bold]" in text


def test_more_refs_than_fit_stand_one_below_the_other_and_samples_are_numbered() -> None:
    results = [answer(ref, "x", sample=sample) for ref in "abcd" for sample in (0, 1)]
    text = listing(results, 80)
    assert text.splitlines()[:4] == ["--- a (1)", "x", "--- b (1)", "x"]
    assert text.count("--- d (2)") == 1


def test_control_characters_are_spelt() -> None:
    assert shown("a\x1b[31m\x07\tb\n\x9b") == "a\\x1b[31m\\x07\tb\n\\x9b"
