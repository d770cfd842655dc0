"""A learnt turn follows what the model is given when it answers: in one example for all turns where the template allows it, else one a turn."""

from copy import deepcopy

import pytest

from finetune.errors import DataError
from finetune.recipe.schema import ChatTask
from finetune.tasks.chat import encoder, explainer
from finetune.tasks.chat_template import with_variables
from finetune.tasks.rendering import Renderer
from tests.conftest import CHATML

HEADER = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
FOOTER = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
FORGETS_THOUGHTS = (
    HEADER
    + "{% if message['reasoning_content'] and loop.last %}{{ '<think>' + message['reasoning_content'] + '</think>' }}{% endif %}"
    "{{ message['content'] }}" + FOOTER
)
REWRITES_EARLIER_TURNS = (
    HEADER
    + "{% if message['role'] == 'assistant' and not loop.last %}{{ 'cut' }}{% else %}{{ message['content'] }}{% endif %}"
    + FOOTER
)
COUNTS = CHATML.replace("{% for", "{{ '[' + messages | length | string + ']' }}{% for", 1)
NEXT_ROLE_ENDS = (
    "{% for message in messages %}{{ '<|im_end|>' if message['role'] == 'user' else '<|im_start|>' }}{{ '\n' + message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>\n' }}{% endif %}"
)
ENDS_THE_TEXT = CHATML.replace(
    "{% if add", "{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}{% if add"
)
LISTS_ONLY = CHATML.replace(
    "message['content'] +",
    "(message['content'] | map(attribute='text') | join if message['content'] is not string else '') +",
)


def asking(prompt):
    return CHATML.replace("assistant\n' }}{% endif", f"assistant\n{prompt}' }}}}{{% endif")


def chat(*contents, **fields):
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
    return {"messages": [message | (fields if message["role"] == "assistant" else {}) for message in messages]}


@pytest.fixture
def examples(tiny_tokenizer, tmp_path):
    """A function from a row and a template to each example's text before what is learnt, and what is learnt."""

    def examples(row, template, stops=("<|im_end|>",), allowed=(), **task):
        (tmp_path / "own.jinja").write_text(template)
        section = ChatTask(name="chat", template=str(tmp_path / "own.jinja"), **task)
        ids = set(tiny_tokenizer.convert_tokens_to_ids(list(stops)))
        [found] = encoder(tiny_tokenizer, section, ids, allowed=allowed)([row], ["row 1"])
        pairs = []
        for example in found:
            first = int(example.supervised.argmax())
            learnt = example.tokens[example.supervised]
            pairs.append((tiny_tokenizer.decode(example.tokens[:first]), tiny_tokenizer.decode(learnt)))
        return pairs

    return examples


def test_a_template_that_forgets_thoughts_gets_one_example_a_turn_each_as_the_model_sees_it(examples, tiny_tokenizer):
    row = chat("ask", "one", "more", "two", reasoning_content="hm")
    found = examples(row, FORGETS_THOUGHTS)
    assert [learnt for _, learnt in found] == ["<think>hm</think>one<|im_end|>", "<think>hm</think>two<|im_end|>"]
    renderer = Renderer(tiny_tokenizer, FORGETS_THOUGHTS)
    assert [prompt for prompt, _ in found] == [renderer.text(row["messages"][:end], with_header=True) for end in (1, 3)]
    assert "hm" not in found[1][0], "the model forgot its first thought when it answered again"


def test_a_template_that_rewrites_earlier_turns_gets_one_example_a_turn(examples):
    found = examples(chat("ask", "one", "more", "two"), REWRITES_EARLIER_TURNS)
    assert [learnt for _, learnt in found] == ["one<|im_end|>", "two<|im_end|>"]
    assert "cut" in found[1][0] and "one" not in found[1][0]


def test_a_template_that_renders_turns_alike_gets_one_example_for_all(examples):
    assert [learnt for _, learnt in examples(chat("ask", "one", "more", "two"), CHATML)] == [
        "one<|im_end|>two<|im_end|>"
    ]


def test_what_is_before_a_turn_is_what_the_model_was_given_also_where_the_turn_changes_it(examples):
    assert examples(chat("ask", "one"), COUNTS) == [
        ("[1]<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\n", "one<|im_end|>")
    ]


@pytest.mark.parametrize(
    "prompt", ["<think>\n\n</think>\n\n", "</think>", "<|channel>thought\n<channel|>", "[THINK][/THINK]", "  "]
)
def test_a_generation_prompt_with_an_empty_thought_stands_before_the_answer(examples, prompt):
    [(before, learnt)] = examples(chat("ask", "one"), asking(prompt))
    assert before.endswith("<|im_start|>assistant\n" + prompt) and learnt == "one<|im_end|>"


def test_a_thought_that_a_generation_prompt_opens_is_closed_by_the_turn(examples):
    thinking = "{% if message['role'] == 'assistant' %}{{ '<think>' + (message['reasoning_content'] or '') + '</think>' }}{% endif %}"
    template = HEADER + thinking + "{{ message['content'] }}" + FOOTER.replace("assistant\n", "assistant\n<think>\n")
    for thought in ("", "hm"):
        [(before, learnt)] = examples(chat("ask", "one", reasoning_content=thought), template)
        assert before.endswith("assistant\n<think>\n") and learnt == f"{thought}</think>one<|im_end|>"


def test_an_open_thought_that_the_turn_lacks_is_refused(examples):
    with pytest.raises(DataError) as caught:
        examples(chat("ask", "one"), asking("<think>\n"))
    assert str(caught.value) == (
        "row 1: the chat template asks for an answer with '<|im_start|>assistant\\n<think>\\n', and begins the turn `messages[1]` with "
        "'<|im_start|>assistant\\none<|im_end|>\\n', so assistant tokens cannot be told apart\n"
        "hint: give the turn a thought, turn thinking off with task.template_variables, or name another task.template"
    )


def test_a_turn_that_ends_with_the_next_role_s_token_learns_that_token_also_at_the_end(examples):
    [(_, learnt)] = examples(chat("ask", "one", "more", "two"), NEXT_ROLE_ENDS)
    assert learnt == "one<|im_end|>two<|im_end|>"


def test_a_token_that_ends_the_text_keeps_turns_in_one_example(examples):
    found = examples(chat("ask", "one", "more", "two"), ENDS_THE_TEXT, stops=("<|im_end|>", "<|endoftext|>"))
    assert [learnt for _, learnt in found] == ["one<|im_end|>two<|im_end|>\n<|endoftext|>"]


def test_a_template_that_reads_contents_as_lists_of_parts_is_given_them(examples):
    assert [learnt for _, learnt in examples(chat("ask", "one"), LISTS_ONLY)] == ["one<|im_end|>"]


def test_a_row_may_learn_its_last_turn_alone_or_every_token_once(examples, tiny_tokenizer):
    row = chat("ask", "one", "more", "two", reasoning_content="hm")
    assert [learnt for _, learnt in examples(row, FORGETS_THOUGHTS, learn="last")] == ["<think>hm</think>two<|im_end|>"]
    whole = tiny_tokenizer.apply_chat_template(chat("ask", "one")["messages"], chat_template=CHATML, tokenize=False)
    assert examples(chat("ask", "one"), CHATML, learn="all") == [("", whole)]
    first, second = examples(row, FORGETS_THOUGHTS, learn="all")
    assert first[0] == "" and second[0].endswith("<|im_start|>assistant\n"), "what both have in common is learnt once"


def test_a_turn_that_is_not_to_be_learnt_contradicts_a_recipe_that_learns_all(examples):
    row = chat("ask", "one", "more", "two")
    row["messages"][1]["weight"] = 0
    with pytest.raises(
        DataError, match=r"`messages\[1\]` is not to be learnt, and `task.learn: all` learns every token"
    ):
        examples(row, CHATML, learn="all")


def test_a_template_that_begins_with_blanks_keeps_them_with_variables(examples):
    [(before, _)] = examples(chat("ask", "one"), "  {{ tone }}" + CHATML, template_variables={"tone": "!"})
    assert before.startswith("  !<|im_start|>")


def test_the_recipe_s_system_message_is_given_to_rows_that_have_none(examples):
    own = {"messages": [{"role": "system", "content": "Own."}, *chat("ask", "one")["messages"]]}
    for row, said in ((chat("ask", "one"), "Be brief."), (own, "Own.")):
        [(before, _)] = examples(row, CHATML, system="Be brief.")
        assert before.startswith(f"<|im_start|>system\n{said}<|im_end|>") and before.count("system") == 1


def test_a_developer_message_is_a_system_message(examples):
    row = chat("ask", "one")
    row["messages"].insert(0, {"role": "developer", "content": "Be short."})
    [(prompt, _)] = examples(row, CHATML, system="Be long.")
    assert prompt.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user")


def test_lost_text_is_allowed_only_where_no_way_to_give_contents_keeps_it(examples):
    assert examples(chat("ask", "one"), LISTS_ONLY, allowed=("lost_text",)) == examples(chat("ask", "one"), LISTS_ONLY)
    drops_thoughts = chat("ask", "one", reasoning_content="hm")
    assert [learnt for _, learnt in examples(drops_thoughts, CHATML, allowed=("lost_text",))] == ["one<|im_end|>"]


@pytest.mark.parametrize("name", ["is_lout", "none", "range"])
def test_a_variable_that_the_template_does_not_read_is_refused(examples, name):
    switched = CHATML + "{% if is_loud is defined and is_loud %}!{% endif %}"
    with pytest.raises(DataError, match=f"the chat template reads no variable `{name}`\nhint: it reads `is_loud`"):
        examples(chat("ask", "one"), switched, template_variables={name: True})
    with pytest.raises(DataError, match="hint: it has no switches: remove the key"):
        examples(chat("ask", "one"), CHATML, template_variables={name: True})


def test_many_texts_are_encoded_in_several_calls_with_the_same_result(examples, monkeypatch):
    row = chat(*["ask", "answer"] * 5, reasoning_content="hm")
    found = examples(row, FORGETS_THOUGHTS)
    monkeypatch.setattr("finetune.tasks.chat.CHARACTERS_AT_ONCE", 150)
    assert examples(row, FORGETS_THOUGHTS) == found and len(found) == 5


def test_variables_of_a_template_travel_as_its_first_line_and_a_caller_may_change_them(examples, tiny_tokenizer):
    switched = "{% if is_loud %}{{ '!' }}{% endif %}{{ tone }}" + CHATML
    [(before, _)] = examples(chat("ask", "one"), switched, template_variables={"is_loud": True, "tone": "it's"})
    assert before.startswith("!it's<|im_start|>")
    template = with_variables(switched, {"is_loud": True})
    assert with_variables(template, {"is_loud": True}) == template, "in a checkpoint it is there already"
    quiet = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], chat_template=template, tokenize=False, is_loud=False
    )
    assert quiet.startswith("<|im_start|>")


MARKED = HEADER + (
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_marks_of_a_template_must_agree_with_what_is_learnt(examples):
    assert [learnt for _, learnt in examples(chat("ask", "one", "more", "two"), MARKED)] == [
        "one<|im_end|>two<|im_end|>"
    ]
    without_stop = MARKED.replace("+ '<|im_end|>' }}{% endgen", "}}{% endgen").replace(
        "{{ '\n' }}{% else", "{{ '<|im_end|>\n' }}{% else"
    )
    with pytest.raises(DataError) as caught:
        examples(chat("ask", "one"), without_stop)
    assert str(caught.value) == (
        "row 1: the chat template marks 'one' of `messages[1]` as generated, but the model writes 'one<|im_end|>'\n"
        "hint: correct its {% generation %} marks, or remove them all"
    )


def test_text_that_spells_a_stop_token_is_refused_even_if_that_is_not_special(tiny_tokenizer, tmp_path):
    (tokenizer := deepcopy(tiny_tokenizer)).add_tokens(["<stop>", "<word>"])
    (tmp_path / "own.jinja").write_text(CHATML.replace("<|im_end|>", "<stop>"))
    stops = set(tokenizer.convert_tokens_to_ids(["<stop>"]))
    encode = encoder(tokenizer, ChatTask(name="chat", template=str(tmp_path / "own.jinja")), stops)
    assert len(encode([chat("a <word>", "one")], ["row 1"])) == 1
    with pytest.raises(DataError, match="a user message spells the control token `<stop>`"):
        encode([chat("a <stop>", "one")], ["row 1"])


def test_each_token_has_a_reason(tiny_tokenizer):
    row = {"messages": [{"role": "system", "content": "s"}, *chat("ask", "one", "more", "two")["messages"]]}
    row["messages"][2]["weight"] = 0
    tokenizer_template = ChatTask(name="chat", max_length=30)
    tiny_tokenizer.chat_template = CHATML
    [found] = explainer(tiny_tokenizer, tokenizer_template, {tiny_tokenizer.eos_token_id})(row, "row 1")
    seen = dict.fromkeys(found.reasons)
    assert list(seen) == [
        "not learnt: the first token of an example, which nothing predicts",
        "not learnt: messages[0], a system message with its header",
        "not learnt: messages[1], a user message with its header",
        "not learnt: messages[2] has `weight: 0` or `train: false`",
        "not learnt: messages[3], a user message with its header",
        "not learnt: what the model is given to begin messages[4]",
        "learnt: messages[4]",
        "learnt: ends messages[4]",
        "not learnt: the template writes it after the stop token of messages[4]",
    ]
    assert found.kept == 30 < len(found.tokens) == len(found.reasons)
    assert [found.text[first:last] for first, last in found.offsets.tolist()][-2:] == ["<|im_end|>", "\n"]


def test_a_turn_that_opens_a_conversation_after_a_system_column_says_so(tiny_tokenizer):
    row = chat("ask", "two") | {"system": "Be short."}
    row["messages"] = [{"role": "assistant", "content": each} for each in ("hello", "there")] + row["messages"]
    stops = set(tiny_tokenizer.convert_tokens_to_ids(["<|im_end|>"]))
    [found] = explainer(tiny_tokenizer, ChatTask(name="chat"), stops)(row, "row 1")
    for number in (0, 1):
        assert f"not learnt: messages[{number}] opens the conversation, so nothing asks for it" in found.reasons
