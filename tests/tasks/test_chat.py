"""The loss is on what the assistant says and on the token that ends its turn, whatever the template; bad rows are named."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors

from finetune.errors import DataError
from finetune.model.base import named
from finetune.recipe.schema import ChatTask
from finetune.tasks.chat import encoder
from tests.conftest import CHATML

LLAMA_3 = (
    "{{ '<|endoftext|>' }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITHOUT_STOP_TOKEN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
STRICT = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HINT = "\nhint: give a chat template of your own with task.template: FILE"

STOP_HINT = "\nhint: name the token that ends a turn with task.stop, or give a chat template of your own with task.template: FILE"


def turns(*contents, roles=("user", "assistant")):
    return [{"role": roles[number % len(roles)], "content": content} for number, content in enumerate(contents)]


@pytest.fixture
def encoded(tiny_tokenizer, tmp_path):
    """A function from a row to its example, with a template and settings of the test's own."""

    def encoded(row, template=None, tokenizer=tiny_tokenizer, stop_tokens=None, base_template=None, **task):
        if base_template is not None:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.chat_template = base_template
        if template is not None:
            (tmp_path / "template.jinja").write_text(template)
            task["template"] = str(tmp_path / "template.jinja")
        stops = {tokenizer.eos_token_id} if stop_tokens is None else stop_tokens
        [[example]] = encoder(tokenizer, ChatTask(name="chat", **task), stops)([row], ["data.jsonl:1"])
        return example

    return encoded


@pytest.fixture
def learnt(encoded, tiny_tokenizer):
    """A function from a row to the texts that the loss is on, one a stretch of supervised tokens."""

    def learnt(row, template=None, **options):
        tokens, supervised, *_ = encoded(row, template, **options)
        stretches, is_open = [], False
        for token, is_supervised in zip(tokens.tolist(), supervised.tolist(), strict=True):
            if is_supervised and not is_open:
                stretches.append([])
            if is_supervised:
                stretches[-1].append(token)
            is_open = is_supervised
        return [tiny_tokenizer.decode(stretch) for stretch in stretches]

    return learnt


def complaint(encoded, row, template=None, **options):
    with pytest.raises(DataError) as caught:
        encoded(row, template, **options)
    return str(caught.value)


@pytest.mark.parametrize("template", [None, LLAMA_3, DEFAULT_SYSTEM, STRICT])
def test_the_answer_and_its_stop_token_are_learnt_and_nothing_else(learnt, template):
    assert learnt({"messages": turns("the question", "an answer")}, template) == ["an answer<|im_end|>"]


@pytest.mark.parametrize("template", [None, LLAMA_3, DEFAULT_SYSTEM, STRICT])
def test_every_assistant_turn_of_a_conversation_is_learnt(learnt, template):
    row = {"messages": turns("one", "the first", "two", "the second", "a question without an answer")}
    assert learnt(row, template) == ["the first<|im_end|>", "the second<|im_end|>"]


def test_two_assistant_turns_in_a_row_are_both_learnt_without_the_header_between(learnt):
    row = {"messages": turns("ask", "one", "two", roles=("user", "assistant", "assistant"))}
    assert learnt(row) == ["one<|im_end|>", "two<|im_end|>"]


def test_the_tokens_are_those_of_the_whole_rendered_conversation(encoded, tiny_tokenizer):
    row = {"messages": turns("the question", "an answer")}
    text = "<|im_start|>user\nthe question<|im_end|>\n<|im_start|>assistant\nan answer<|im_end|>\n"
    example = encoded(row)
    assert tiny_tokenizer.decode(example.tokens) == text
    assert example.tokens.tolist() == tiny_tokenizer.apply_chat_template(row["messages"])["input_ids"]
    assert example.cut_tokens == 0
    assert not example.supervised[-1]  # the newline that the template writes after the stop token


@pytest.mark.parametrize("template", [None, LLAMA_3, DEFAULT_SYSTEM])
def test_a_system_message_is_given_not_learnt(learnt, template):
    row = {"messages": turns("be brief", "ask", "answer", roles=("system", "user", "assistant"))}
    assert learnt(row, template) == ["answer<|im_end|>"]


def test_a_default_system_prompt_of_the_template_is_in_the_text_but_not_learnt(encoded, learnt, tiny_tokenizer):
    row = {"messages": turns("ask", "answer")}
    assert "Be kind." in tiny_tokenizer.decode(encoded(row, DEFAULT_SYSTEM).tokens)
    assert learnt(row, DEFAULT_SYSTEM) == ["answer<|im_end|>"]


def test_prompt_and_completion_are_a_question_and_its_answer(encoded):
    from_texts = encoded({"prompt": "ask", "completion": "answer"})
    from_lists = encoded({"prompt": turns("ask"), "completion": turns("answer", roles=("assistant",))})
    from_messages = encoded({"messages": turns("ask", "answer")})
    for example in (from_texts, from_lists):
        assert example.tokens.tolist() == from_messages.tokens.tolist()
        assert example.supervised.tolist() == from_messages.supervised.tolist()


def test_an_assistant_turn_of_the_prompt_is_not_learnt(learnt):
    prompt = turns("one", "the first", "two")
    assert learnt({"prompt": prompt, "completion": "the second"}) == ["the second<|im_end|>"]
    completion = turns("the second", "three", "the third", roles=("assistant", "user"))
    assert learnt({"prompt": prompt, "completion": completion}) == ["the second<|im_end|>", "the third<|im_end|>"]


@pytest.mark.parametrize(
    "content",
    [
        "你好，世界",
        "🤖👩‍👩‍👧‍👦 done",
        "naïve — Ünïcödé ✓",
        " a  b   c ",
        "one\n\n    two\n",
        "\tx",
        "مرحبا",
        "a\u0301",
        "0\x00\x7f",
        "\ufeffx",
    ],
)
@pytest.mark.parametrize("is_trimming", [False, True])
def test_no_character_of_an_answer_is_lost(learnt, tiny_tokenizer, content, is_trimming):
    """Byte-level tokens split characters, and tokenizers like Llama 3's leave blanks out of their offsets."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=is_trimming)
    row = {"messages": turns(content, content, content, content)}
    assert learnt(row, tokenizer=tokenizer) == [f"{content}<|im_end|>"] * 2


def test_blanks_that_end_a_header_are_not_learnt_by_a_tokenizer_that_trims_offsets(learnt, tiny_tokenizer):
    template = (
        "{% for message in messages %}{{ message['role'] + ':  ' + message['content'] + '<|im_end|>  ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:  ' }}{% endif %}"
    )
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert learnt({"messages": turns("ask", "!yes", "more", "!no")}, template, tokenizer=tokenizer) == [
        "!yes<|im_end|>",
        "!no<|im_end|>",
    ]


CONTENT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1, max_size=20).filter(
    str.strip
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))
def test_what_is_learnt_is_what_the_assistant_says_for_any_text(learnt, pairs):
    row = {"messages": [message for pair in pairs for message in turns(*pair)]}
    assert learnt(row) == [f"{answer}<|im_end|>" for _, answer in pairs]


def test_a_long_row_is_cut_at_max_length_and_says_by_how_much(encoded):
    row = {"messages": turns("the question", "an answer")}
    whole = encoded(row)
    for max_length in (1, len(whole.tokens) - 3, len(whole.tokens) - 1, len(whole.tokens), len(whole.tokens) + 1):
        example = encoded(row, max_length=max_length)
        assert example.tokens.tolist() == whole.tokens[:max_length].tolist()
        assert example.supervised.tolist() == whole.supervised[:max_length].tolist()
        assert example.cut_tokens == max(0, len(whole.tokens) - max_length)


def test_a_word_that_shares_its_first_token_with_the_header_is_learnt_whole(learnt):
    template = WITHOUT_STOP_TOKEN.replace("'\n' }}{% endfor", "'<|im_end|>\n' }}{% endfor")
    assert learnt({"messages": turns("ask", "answer")}, template) == [" answer<|im_end|>"]  # ` an` is one token


def test_any_token_that_ends_generation_may_end_a_turn(learnt, tiny_tokenizer):
    template = WITHOUT_STOP_TOKEN.replace("message['content'] + ", "message['content'] + '<|endoftext|>' + ")
    stops = set(tiny_tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    assert learnt({"messages": turns("ask", "answer")}, template, stop_tokens=stops) == [" answer<|endoftext|>"]


def test_a_template_without_a_stop_token_is_refused(encoded):
    assert complaint(encoded, {"messages": turns("ask", "!")}, WITHOUT_STOP_TOKEN) == (
        "data.jsonl:1: the chat template ends the turn `messages[1]` with `!`, not with a stop token (`<|im_end|>`): "
        "the tuned model would not stop" + STOP_HINT
    )


def test_a_base_without_a_stop_token_is_refused(encoded):
    assert complaint(encoded, {"messages": turns("ask", "answer")}, stop_tokens=set()) == (
        "data.jsonl:1: the chat template ends the turn `messages[1]` with `<|im_end|>`, not with a stop token (none): "
        "the tuned model would not stop" + STOP_HINT
    )


def test_a_template_that_drops_what_the_assistant_says_is_refused(encoded):
    template = "{% for message in messages %}{{ message['role'] }}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    assert complaint(encoded, {"messages": turns("ask", "answer")}, template) == (
        "data.jsonl:1: the rendered text lacks `messages[0].content`, `messages[1].content`\n"
        "hint: use a template that shows it, with task.template: FILE, or a built-in one like `chatml`"
    )


def test_a_template_that_refuses_the_order_of_roles_is_quoted(encoded):
    row = {"messages": turns("one", "two", "answer", roles=("user", "user", "assistant"))}
    assert complaint(encoded, row, STRICT) == (
        "data.jsonl:1: the chat template refuses `messages[1]`: roles must alternate user and assistant\n"
        "hint: look at the order of roles in it"
    )


def test_a_template_with_a_mistake_in_it_is_quoted(encoded):
    message = complaint(encoded, {"messages": turns("ask", "answer")}, "{% for message in messages %}")
    assert "template.jinja: the template renders no conversation: TemplateSyntaxError: Unexpected end of" in message


def test_a_template_file_that_is_not_there_is_named(tiny_tokenizer, tmp_path):
    file = str(tmp_path / "missing.jinja")
    with pytest.raises(DataError) as caught:
        encoder(tiny_tokenizer, ChatTask(name="chat", template=file), set())
    hint = f"task.template names a file, or one of: {', '.join(named.NAMES)}"
    assert str(caught.value) == f"{file}: cannot be read: No such file or directory\nhint: {hint}"


def test_a_base_without_a_template_is_refused(encoded, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    assert (
        complaint(encoded, {"messages": turns("a", "b")}, tokenizer=tokenizer) == "the base has no chat template" + HINT
    )


@pytest.mark.parametrize("speaker", [0, 1])
def test_text_that_spells_a_control_token_is_refused(encoded, speaker):
    contents = ["ask", "answer"]
    contents[speaker] += " <|im_start|>system"
    assert complaint(encoded, {"messages": turns(*contents)}) == (
        f"data.jsonl:1: a {('user', 'assistant')[speaker]} message spells the control token `<|im_start|>`\n"
        "hint: remove or respell it"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "has neither `messages` nor `prompt` and `completion`; its columns are: none"),
        (
            {"text": "a", "prompt": "b"},
            "has neither `messages` nor `prompt` and `completion`; its columns are: prompt, text",
        ),
    ],
)
def test_a_row_without_the_columns_names_those_it_has(encoded, row, message):
    assert complaint(encoded, row) == (
        f"data.jsonl:1: {message}\nhint: map columns with data.train[].columns, like {{prompt: ask, completion: reply}}, "
        'or write patterns, like `prompt: "{question}"`'
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": turns("ask")},
            "has no assistant turn, so there is nothing to learn from it\nhint: remove the row",
        ),
        (
            {"messages": turns("ask", "yes", roles=("human", "Assistant"))},
            "has no assistant turn, so there is nothing to learn from it\nhint: its roles are: human, Assistant",
        ),
        ({"messages": turns("ask", "")}, "has an empty assistant turn\nhint: remove the row"),
        ({"messages": turns("ask", " \n\t")}, "has an empty assistant turn\nhint: remove the row"),
        ({"messages": turns("ask", "yes", "more", "")}, "has an empty assistant turn\nhint: remove the row"),
        ({"prompt": "ask", "completion": ""}, "has an empty assistant turn\nhint: remove the row"),
        (
            {"messages": turns("hello", "ask", roles=("assistant", "user"))},
            "begins with an assistant turn, which answers nothing\nhint: remove the turn",
        ),
        (
            {"prompt": turns("hello", roles=("assistant",)), "completion": "answer"},
            "begins with an assistant turn, which answers nothing\nhint: remove the turn",
        ),
        (
            {"prompt": turns("ask", "yes", "more"), "completion": turns("again")},
            "has no assistant turn, so there is nothing to learn from it\nhint: remove the row",
        ),
        ({"messages": "[]"}, "`messages` must be a list of messages, each with `role` and `content`, not text"),
        ({"messages": []}, "`messages` is an empty list\nhint: remove the row"),
        ({"prompt": 3, "completion": "a"}, "`prompt` must be text or a list of messages, not a number"),
        ({"prompt": "a", "completion": []}, "`completion` is an empty list\nhint: remove the row"),
        ({"messages": ["hello"]}, "`messages[0]` must have a `role`"),
        (
            {"messages": [*turns("ask"), {"from": "gpt", "value": "a"}]},
            "`messages[1]` must have a `role`\nhint: its fields are: from, value",
        ),
        ({"messages": [*turns("ask"), {"role": "assistant"}]}, "`messages[1]` must have a `content` that is text"),
        (
            {"messages": [*turns("ask"), {"role": "assistant", "content": [{"type": "text"}]}]},
            "`messages[1]` must have a `content` that is text\nhint: join its parts into one text; images and the like are not read",
        ),
        (
            {"messages": [*turns("ask"), {"role": "assistant", "content": None, "refusal": "no"}]},
            "`messages[1]` must have a `content` that is text\nhint: its other fields are: refusal",
        ),
        (
            {"prompt": "ask", "completion": "bad", "label": False},
            "`label` is false: its completion shows what not to answer\n"
            "hint: remove the row, or learn it all the same with data.train[].skip: [label]",
        ),
    ],
)
def test_a_row_that_cannot_be_learnt_from_is_named(encoded, row, message):
    assert complaint(encoded, row) == f"data.jsonl:1: {message}"


def test_an_empty_user_turn_and_a_null_column_are_no_problem(learnt):
    assert learnt({"messages": turns("", "answer")}) == ["answer<|im_end|>"]
    assert learnt({"messages": None, "prompt": "", "completion": "answer"}) == ["answer<|im_end|>"]


def test_of_many_rows_the_bad_one_is_named(tiny_tokenizer):
    encode = encoder(tiny_tokenizer, ChatTask(name="chat"), {tiny_tokenizer.eos_token_id})
    good = {"messages": turns("ask", "answer")}
    assert [len(examples) for examples in encode([good] * 3, ["a:1", "a:2", "a:3"])] == [1, 1, 1]
    with pytest.raises(DataError, match="^a:2: has no assistant turn"):
        encode([good, {"messages": turns("ask")}, good], ["a:1", "a:2", "a:3"])


# Renders tools, reasoning and tool calls as templates in use do (Qwen 3), with ChatML's control tokens.
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    """{{ '<tool_call>{"name": "' + call.function.name + '", "arguments": ' + ARGUMENTS + '}</tool_call>' }}{% endfor %}"""
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OBJECTS = TOOLS.replace("ARGUMENTS", "call.function.arguments | tojson")
TEXTS = TOOLS.replace("ARGUMENTS", "call.function.arguments")
PRINTS = TOOLS.replace("' + ARGUMENTS + '", "' ~ call.function.arguments ~ '")
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'Says "how it is" outside.',
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}},
    },
}


def called(arguments, **others):
    call = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call], **others}


def with_call(arguments, **others):
    result = {"role": "tool", "tool_call_id": "1", "content": '{"sky": "blue"}'}
    return {
        "messages": [*turns("how is it"), called(arguments, **others), result, *turns("fine", roles=("assistant",))]
    }


@pytest.mark.parametrize("template", [OBJECTS, TEXTS, PRINTS])
@pytest.mark.parametrize("arguments", [{"city": 'Köln, "old"'}, '{"city":"Köln, \\"old\\""}'])
def test_tool_calls_are_learnt_as_json_however_they_are_given_and_asked_for(learnt, template, arguments):
    row = with_call(arguments) | {"tools": [WEATHER]}
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Köln, \\"old\\""}}</tool_call>'
    assert learnt(row, base_template=template) == [f"{call}<|im_end|>", "fine<|im_end|>"]


def test_a_result_that_repeats_arguments_as_python_does_changes_no_call(learnt):
    row = with_call({"city": "Rome"})
    row["messages"][2]["content"] = "called with {'city': 'Rome'}"
    assert '"arguments": {"city": "Rome"}' in learnt(row, base_template=OBJECTS)[0]


def test_arguments_of_a_call_may_be_called_parameters_and_nothing_else_of_it_is_lost(encoded, learnt):
    row = with_call({"city": "Rome"})
    function = row["messages"][1]["tool_calls"][0]["function"]
    function["parameters"] = function.pop("arguments")
    assert '"arguments": {"city": "Rome"}' in learnt(row, base_template=OBJECTS)[0]
    function["arguments"] = {"city": "Paris"}
    with pytest.raises(DataError, match=r"lacks `messages\[1\].tool_calls\[0\].function.parameters.city`"):
        encoded(row, base_template=OBJECTS)


@pytest.mark.parametrize("tools", [[WEATHER], json.dumps([WEATHER]), [json.dumps(WEATHER)]])
def test_tools_reach_the_template_as_a_list_or_as_text(encoded, tiny_tokenizer, tools):
    text = tiny_tokenizer.decode(
        encoded({"messages": turns("ask", "answer"), "tools": tools}, base_template=OBJECTS).tokens
    )
    assert f"<|im_start|>system\n{json.dumps(WEATHER)}\n<|im_end|>" in text


@pytest.mark.parametrize("part", [{"weight": 0}, {"train": False}])
def test_a_turn_with_weight_0_is_shown_and_not_learnt(learnt, encoded, part):
    one, two, three, four = turns("one", "the first", "two", "the second")
    assert learnt({"messages": [one, two | part, three, four]}) == ["the second<|im_end|>"]
    row = {"messages": [one, two | part]}
    assert "has no assistant turn to learn" in complaint(encoded, row)


def test_a_system_column_is_the_first_message(encoded):
    plain = encoded({"messages": turns("be brief", "ask", "answer", roles=("system", "user", "assistant"))})
    for row in ({"prompt": "ask", "completion": "answer"}, {"messages": turns("ask", "answer")}):
        assert encoded(row | {"system": "be brief"}).tokens.tolist() == plain.tokens.tolist()


REASONED = [*turns("ask"), {"role": "assistant", "content": "yes", "reasoning_content": "it is yes, clearly"}]


@pytest.mark.parametrize(
    ("row", "lost"),
    [
        ({"messages": turns("ask", "answer"), "tools": [WEATHER]}, "`tools[0].name`, `tools[0].description`, "),
        (with_call({"city": "Oslo"}), "`messages[1].tool_calls[0].function.name`, "),
        (with_call({"city": "Oslo"}, content="let me look"), "`messages[1].tool_calls[0].function.name`, "),
        ({"messages": REASONED}, "`messages[1].reasoning_content`"),
        ({"messages": [*turns("ask"), {**turns("", "yes")[1], "thinking": "hm"}]}, "`messages[1].thinking`"),
        ({"messages": [*turns("ask"), {**turns("", "yes")[1], "masked": True}]}, "`messages[1].masked`"),
        ({"prompt": "ask", "completion": "yes", "input": "the model"}, "`input`"),
        ({"prompt": "ask", "completion": "yes", "history": [["one", "two"]]}, "`history`"),
        ({"messages": turns("ask", "yes"), "images": [{"bytes": b"png"}]}, "`images`"),
        ({"messages": turns("ask", "yes"), "completion": "no"}, "`completion`"),
    ],
)
def test_what_a_row_says_and_its_text_does_not_is_refused_by_name(encoded, row, lost):
    message = complaint(encoded, row)
    assert message.startswith(f"data.jsonl:1: the rendered text lacks {lost}") and "data.train[].skip: [" in message
    assert ("skip: [tools]" in message) == lost.startswith("`tools")
    assert ("hint: put it into a message" in message) == (lost.count(".") == 0)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "ask", "completion": "yes", "input": "", "history": [], "system": None, "images": []},
        {"messages": turns("ask", "yes"), "prompt": "ask", "prompt_id": "af31", "score": 3},
        {"messages": [turns("ask")[0] | {"tool_calls": None}, turns("", "yes")[1] | {"tool_calls": [], "name": None}]},
    ],
)
def test_empty_columns_and_texts_that_stand_in_the_row_twice_lose_nothing(learnt, row):
    assert learnt(row) == ["yes<|im_end|>"]


def test_a_text_may_be_trimmed_and_written_as_json(learnt):
    template = LLAMA_3.replace("message['content'] | trim", "message['content'] | trim | tojson")
    assert learnt({"messages": turns(' say "it"\n', " yes\n\n no ")}, base_template=template) == [
        '"yes\\n\\n no"<|im_end|>'
    ]


def test_reasoning_has_to_be_in_its_own_turn(encoded, learnt):
    assert learnt({"messages": REASONED}, base_template=OBJECTS) == ["<think>it is yes, clearly</think>yes<|im_end|>"]
    row = {"messages": [*turns("it is yes, clearly"), REASONED[1]]}
    assert "lacks `messages[1].reasoning_content`" in complaint(encoded, row)


@pytest.mark.parametrize(("role", "known"), [("human", "user"), ("developer", "system"), ("observation", "tool")])
def test_a_role_of_another_name_becomes_the_one_that_templates_know(encoded, role, known):
    rows = [
        {"messages": [*turns("ask"), {"role": each, "content": "hm"}, *turns("yes", roles=("assistant",))]}
        for each in (role, known)
    ]
    one, other = map(encoded, rows)
    assert one.tokens.tolist() == other.tokens.tolist()


@pytest.mark.parametrize("role", ["gpt", "narrator"])
def test_a_role_that_the_template_does_not_name_is_refused(encoded, learnt, role):
    row = {"messages": [*turns("ask"), {"role": role, "content": "hm"}, *turns("yes", roles=("assistant",))]}
    assert complaint(encoded, row) == (
        f"data.jsonl:1: `messages[1].role` is `{role}`, which the chat template does not name\n"
        "hint: rename it to one of system, user, assistant, tool"
    )
    assert learnt(row, base_template=f"{{% set known = ['{role}'] %}}" + OBJECTS) == ["yes<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "place"),
    [
        (with_call({"city": "<|im_end|>"}), "`messages[1].tool_calls`"),
        (with_call({"<|im_start|>": "x"}), "`messages[1].tool_calls`"),
        ({"messages": [*turns("ask"), turns("", "a")[1] | {"reasoning_content": "<|im_end|>"}]}, "`messages[1].reason"),
        ({"messages": turns("ask", "a"), "tools": [{"name": "x<|im_end|>"}]}, "`tools`"),
        ({"messages": turns("ask", "a"), "system": "<|im_end|>"}, "a system message"),
    ],
)
def test_control_tokens_are_refused_wherever_a_row_has_text(encoded, row, place):
    message = complaint(encoded, row, base_template=OBJECTS)
    assert message.startswith(f"data.jsonl:1: {place}") and "spells the control token `<|im_" in message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (with_call("city: Oslo"), "`messages[1].tool_calls[0].function.arguments` is text that is not JSON: `city: Oslo`"),
        (with_call('{"a": 1, "a": 2}'), "`messages[1].tool_calls[0].function.arguments` is JSON that has the key `a` twice"),
        (with_call('{"a":' * 900 + "1" + "}" * 900), "`messages[1].tool_calls[0].function.arguments` is text that is not JSON: `" + '{"a":' * 8 + "`"),
        (with_call("[1]"), "`messages[1].tool_calls[0].function.arguments` must be an object, or that as JSON text, not a list"),
        ({"messages": [*turns("ask"), called({}) | {"tool_calls": "x"}]}, "`messages[1].tool_calls` must be a list, not text"),
        ({"messages": [*turns("ask"), called({}) | {"tool_calls": [{}]}]}, "`messages[1].tool_calls[0]` must have a `function` with a `name`"),
        ({"messages": turns("ask", "a"), "tools": "get it"}, "`tools` is text that is not JSON: `get it`"),
        ({"messages": turns("ask", "a"), "tools": 3}, "`tools` must be a list of objects, or that as JSON text"),
        ({"messages": turns("ask", "a"), "system": 3}, "`system` must be text, not a number"),
        ({"messages": [*turns("ask"), turns("", "a")[1] | {"weight": 0.5}]}, "`messages[1].weight` must be 0 or 1, not 0.5"),
        ({"messages": [*turns("ask"), turns("", "a")[1] | {"train": "no"}]}, "`messages[1].train` must be true or false, not text"),
        ({"messages": [turns("ask")[0] | {"train": True}, turns("", "a")[1]]}, "`messages[0].train` asks to learn a user message"),
        ({"prompt": "a", "completion": 5}, "`completion` must be text or a list of messages, not a number"),
        ({"prompt": "a", "completion": float("nan")}, "`completion` must be text or a list of messages, not NaN"),
        ({"prompt": "a", "completion": b"b"}, "`completion` must be text or a list of messages, not bytes"),
        ({"prompt": True, "completion": "b"}, "`prompt` must be text or a list of messages, not true or false"),
        ({"prompt": "a", "completion": None}, "`completion` is null\nhint: remove the row"),
        ({"messages": None}, "`messages` is null\nhint: remove the row"),
    ],
)  # fmt: skip
def test_a_field_of_the_wrong_kind_is_named(encoded, row, message):
    assert complaint(encoded, row, base_template=OBJECTS) == f"data.jsonl:1: {message}"


def test_a_run_of_the_first_row_rules_takes_rows_as_it_did(tiny_tokenizer):
    task, stops = ChatTask(name="chat"), {tiny_tokenizer.eos_token_id}
    old, new = (encoder(tiny_tokenizer, task, stops, rules) for rules in (1, 2))
    answer = {**turns("", "yes")[1], "weight": 0, "reasoning_content": "<|im_end|>", "tool_calls": [{"name": "x"}]}
    row = {"messages": [{"role": "human", "content": "ask"}, answer], "tools": [WEATHER], "system": "be brief"}
    [[example]] = old([row], ["data.jsonl:1"])
    assert tiny_tokenizer.decode(example.tokens) == (
        "<|im_start|>human\nask<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    )
    assert tiny_tokenizer.decode(example.tokens[example.supervised]) == "yes<|im_end|>"
    with pytest.raises(DataError):
        new([row], ["data.jsonl:1"])


def test_supervised_tokens_beyond_the_length_are_counted_as_lost(encoded):
    row = {"messages": turns("the question", "an answer")}
    whole = encoded(row)
    for max_length in range(1, len(whole.tokens) + 1):
        example = encoded(row, max_length=max_length)
        assert example.lost_targets == whole.supervised[1:].sum() - example.supervised[1:].sum()


def test_a_template_file_that_is_not_utf_8_is_named_with_its_line(tiny_tokenizer, tmp_path):
    file = tmp_path / "latin.jinja"
    file.write_bytes(CHATML.encode() + "\n{# café #}".encode("latin-1"))
    with pytest.raises(DataError) as caught:
        encoder(tiny_tokenizer, ChatTask(name="chat", template=str(file)), set())
    assert str(caught.value) == (f"{file}: the template is not UTF-8: line 5 has the byte 0xe9\nhint: save it as UTF-8")


def test_the_mark_at_the_start_of_a_template_file_is_in_no_row(tiny_tokenizer, tmp_path):
    file = tmp_path / "marked.jinja"
    file.write_text(CHATML, encoding="utf-8-sig")
    row = {"prompt": "it was", "completion": "said"}
    for task in (ChatTask(name="chat", template=str(file)), ChatTask(name="chat")):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = f"\ufeff{CHATML}"
        [[example]] = encoder(tokenizer, task, {tokenizer.eos_token_id})([row], ["row"])
        assert "\ufeff" not in tokenizer.decode(example.tokens)


def test_several_templates_without_a_default_are_refused_by_name(encoded, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(DataError) as caught:
        encoded({"prompt": "it was", "completion": "said"}, tokenizer=tokenizer)
    assert str(caught.value) == (
        "the base has several chat templates, and none is called `default`: rag, tool_use\n"
        "hint: choose one with task.template: base:rag"
    )
    own = encoder(tokenizer, ChatTask(name="chat", template="base:rag"), {tokenizer.eos_token_id})
    assert own([{"prompt": "it was", "completion": "said"}], ["row 1"])
    tokenizer.chat_template["default"] = CHATML
    assert len(encoded({"prompt": "it was", "completion": "said"}, tokenizer=tokenizer).tokens)
