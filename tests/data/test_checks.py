"""Checks look at hostile text in linear time, and take good text for what it is."""

import numpy as np
import pytest

from finetune.data.checks import CHECKS
from finetune.data.checks.broken_text import double_encoded
from finetune.data.checks.facts import language_of, picture, spread
from finetune.data.checks.looked import Context, Looked, Part, parts_of
from finetune.data.checks.near_copies import compared, similarity
from finetune.recipe.secret_forms import secrets_in

GOOD = [
    "Ein Spaß«, sagte er. CAFÉ», SÃO PAULO, AÇÃO… É’ vero. Ärger, Öl, ÂGE, naïve Æsop, Ñandú, €5 £3 ½ ©",
    "Привет, мир. РИ СИ. Ґанок, їжак. こんにちは世界。 你好，世界！ مرحبا שלום नमस्ते สวัสดี 안녕하세요 Γειά σου",
    "In latin1 tést looks like tÃ©st.",
    "Zażółć gęślą jaźń, İstanbul ışık, Đặng Văn Ngữ, Þórður, œuvre, ‘quoted’ “text” – and — dashes… 🙂",
]
PLACEHOLDERS = [
    "AKIAIOSFODNN7EXAMPLE",
    "ghp_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    "ghp_0123456789abcdefghijABCDEFGHIJ012345",
    "postgres://user:password@localhost/db and redis://:YOUR_PASSWORD_HERE@host",
    "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",
    "sk-your-key-here, hf_..., eyJhbGciOi..., AIzaSyXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXX",
]


def found(name: str, *texts: str, **columns: object) -> list[str]:
    """What a check says of rows with these answers."""
    parts = [
        [Part("user", "messages[0].content", "ask"), Part("assistant", "messages[1].content", text)] for text in texts
    ]
    looker = CHECKS[name].start(Context(["<|im_end|>"], parts.__getitem__, str))
    rows = [Looked(number, str(number), columns, each, number + 1) for number, each in enumerate(parts)]
    said = [finding for row in rows for finding in looker.look(row)]
    return [finding.message for finding in (*said, *looker.end(np.zeros(len(rows), dtype=bool)))]


@pytest.mark.parametrize("text", GOOD)
def test_good_text_of_many_languages_is_no_mojibake(text) -> None:
    assert double_encoded(text) is None


@pytest.mark.parametrize("page", ["cp1252", "latin-1", "cp1251", "cp1250", "mac_roman", "cp437"])
def test_utf_8_that_was_read_as_a_code_page_is_found(page) -> None:
    wrong = "Привет, жизнь".encode().decode(page, "ignore")
    assert double_encoded(f"It says {wrong}.") is not None


@pytest.mark.parametrize("text", PLACEHOLDERS)
def test_placeholders_are_no_secrets(text) -> None:
    assert list(secrets_in(text)) == []


def test_prose_that_only_speaks_of_variables_and_markup_is_fine() -> None:
    jinja = "Write `{{ question }}` in the template, or {{ user.name }}."
    assert found("variables", jinja, "{% for x in y %}{{ question }}{% endfor %}", "{{ price }} euros") == []
    assert found("foreign_tokens", "Use <b>bold</b>, <s>strike</s>, a <|b|> c, array[INST]") == [
        "`messages[1].content` spells `[INST]`, a control token of another template"
    ]
    assert found("double_entities", "a &amp; b &lt; c") == []
    assert found("loops", "ha " * 11, "----- " * 50, "1 1 1 1 1 1 1 1 1 1 1 1 1 1") == []


def test_answers_of_one_character_are_labels_where_most_are() -> None:
    assert found("short_answers", "a", "b", "a longer one") == []
    assert found("short_answers", "a", "one", "two", "three") == [
        "`messages[1].content` (assistant) is one character: 'a'"
    ]


def test_rows_that_share_a_long_prompt_are_no_near_copies() -> None:
    context = " ".join(f"word{number}" for number in range(300))
    one, two = (
        compared([Part("user", "p", context), Part("assistant", "a", answer)])
        for answer in ("it is in the north of the country", "nobody has ever measured that")
    )
    assert similarity(one.whole, two.whole) > 0.9 and similarity(one.answers, two.answers) == 0


@pytest.mark.parametrize(
    "unit", ["-----BEGIN PRIVATE KEY-----", "tÃ©st tést ", "Human: x\n", "{{", "a://b:", "eyJ", "ab ", "é", "\n"]
)
def test_hostile_text_takes_no_more_than_linear_time(unit) -> None:
    """Quadratic work would take minutes here."""
    for name in CHECKS:
        found(name, unit * (400_000 // len(unit)))


def test_the_texts_of_a_row_are_found_in_every_shape_without_an_error() -> None:
    call = {"function": {"name": "f", "arguments": {"city": "Lyon"}}}
    row = {
        "messages": [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            5,
            {"content": [{"text": "in a part"}]},
        ]
    }
    assert [part.text for part in parts_of(row)] == ["f", "Lyon", "in a part"]
    assert [part.role for part in parts_of({"prompt": "ask", "completion": "answer", "system": "be kind"})] == [
        "system",
        "user",
        "assistant",
    ]
    for odd in ({}, {"messages": "text"}, {"messages": None}, {"prompt": 5}, {"text": None}, {"messages": [[1], None]}):
        assert parts_of(odd) == []


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The house is on the hill, and it has not been sold for many years.", "English"),
        ("Das Haus ist nicht auf dem Berg, und es wird für sich verkauft.", "German"),
        ("La maison est dans une ville, et elle n'est pas pour vous.", "French"),
        ("Дом стоит на холме и давно не продан.", "Cyrillic"),
        ("この家は丘の上にあります。", "Japanese"),
        ("这座房子在山上。", "Chinese"),
        ("x = f(y)[0]", "unknown"),
    ],
)
def test_a_language_is_guessed_by_script_and_frequent_words(text, language) -> None:
    assert language_of([Part("assistant", "a", text)]) == language


def test_lengths_have_percentiles_and_a_picture() -> None:
    found = spread(np.array([1, 2, 3, 4, 100]))
    assert (found["percentiles"]["0"], found["percentiles"]["50"], found["percentiles"]["100"]) == (1, 3, 100)
    assert sum(found["counts"]) == 5 and picture(found)[0].endswith("█ 4")
