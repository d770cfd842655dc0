"""From a chat row to the texts of its examples. Refuses a row whose text would lose or forge something, by turn and field."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from finetune.data.completeness import refuse_lost
from finetune.data.conversation import FLAGS, ROLES, Conversation, arguments_of, conversation_of, with_text_arguments
from finetune.data.example import Row
from finetune.data.roles import known_role, with_known_roles
from finetune.errors import DataError
from finetune.recipe.schema import ChatTask
from finetune.tasks.rendering import Renderer, TemplateError
from finetune.tasks.thought_marks import begin_of_marks
from finetune.tasks.turns import Ends, Rendered, rendered

AS_IT_COMES = ("'type': 'text'", '"type": "text"')
"""What a template writes that prints a list of parts as it comes."""


@dataclass(frozen=True)
class ChatRows:
    """What turns rows into texts."""

    task: ChatTask
    renderer: Renderer
    ends: Ends
    row_rules: int
    allowed: frozenset[str] = frozenset()
    """Gates that are open: `lost_text` and `unlearnt_stop`."""

    def conversation(self, row: Row, place: str) -> Conversation:
        """The conversation of a row, with what the recipe adds and learns. Raises DataError for a bad row."""
        conversation = conversation_of(row, place, self.row_rules)
        if self.task.learn == "all":
            _refuse_unlearnt(row, place)
        if self.task.system is not None and known_role(conversation.messages[0]["role"]) != "system":
            message = {"role": "system", "content": self.task.system}
            conversation = conversation._replace(
                messages=[message, *conversation.messages],
                places=["task.system", *conversation.places],
                turns=[number + 1 for number in conversation.turns],
            )
        if self.row_rules > 1:
            conversation = with_known_roles(conversation, partial(_is_named, self.renderer.template))
            _refuse_roles(conversation, self.renderer.template, place)
        _refuse_control_tokens(conversation, place, self.ends.control, is_all=self.row_rules > 1)
        return conversation._replace(turns=conversation.turns[-1:]) if self.task.learn == "last" else conversation

    def rendered(self, row: Row, place: str) -> list[Rendered]:
        """The texts of a row's examples."""
        conversation = self.conversation(row, place)
        if self.row_rules == 1:
            return rendered(self.renderer, conversation, self.ends, place)
        try:
            return self._complete(conversation, conversation, row, place)
        except DataError as error:
            # Some templates read contents only as lists of parts.
            with suppress(DataError):
                found = self._complete(_with_parts(conversation), conversation, row, place)
                if not any(sign in one.text for sign in AS_IT_COMES for one in found):
                    return found
            if "lost_text" in self.allowed:
                with suppress(DataError):
                    return self._rendered(conversation, place)[0]
            raise error if not isinstance(error, TemplateError) else self._named(error, conversation) from None

    def asked(self, row: Row, place: str) -> str:
        """What the model is given when it is asked for the last learnt turn of a row."""
        try:
            last = self.rendered(row, place)[-1]
        except DataError as error:
            # A template that nothing can be learnt from may still ask, if it shows everything.
            with suppress(DataError):
                return self._asked_only(row, place)
            raise error from None
        return last.text[: last.spans[-1][0]]

    def _asked_only(self, row: Row, place: str) -> str:
        conversation = self.conversation(row, place)
        number = conversation.turns[-1]
        before = conversation._replace(
            messages=conversation.messages[:number], places=conversation.places[:number], turns=[]
        )
        text = self.renderer.text(before.messages, place, before.tools, with_header=True)
        answers = (at for at, message in enumerate(before.messages) if message["role"] == "assistant")
        refuse_lost(before, row, [text, *(self.through(before, at, place) for at in answers)], {}, place)
        return text

    def _named(self, error: TemplateError, conversation: Conversation) -> DataError:
        """The error of a template with the message that it does not take: the first one after which it renders nothing."""
        for number in range(len(conversation.messages) - 1, -1, -1):
            with suppress(DataError):
                if number:
                    self.through(conversation, number - 1)
                return error.at(conversation.places[number])
        return error

    def _complete(self, given: Conversation, conversation: Conversation, row: Row, place: str) -> list[Rendered]:
        """The texts of what the template is given. Raises DataError if they lack content of the conversation."""
        found, given = self._rendered(given, place)
        if not found[0].is_whole:  # nothing is learnt from what no turn follows
            end = conversation.turns[-1] + 1
            conversation = conversation._replace(messages=conversation.messages[:end], places=conversation.places[:end])
        texts = [each.text for each in found]
        try:
            refuse_lost(conversation, row, texts, _learnt(found), place)
        except DataError:
            # A content may spell the thought that the generation prompt opens.
            texts += self._once_written(given, place)
            refuse_lost(conversation, row, texts, _learnt(found, with_marks=True), place)
        return found

    def _once_written(self, conversation: Conversation, place: str) -> list[str]:
        """Turns that are not learnt, as they were when they were the last: where a template drops their thoughts later, the model is not
        given them either."""
        given = range(conversation.turns[-1])
        unlearnt = [
            number
            for number in given
            if conversation.messages[number]["role"] == "assistant" and number not in conversation.turns
        ]
        return [self.through(conversation, number, place) for number in unlearnt]

    def through(self, conversation: Conversation, number: int, place: str | None = None) -> str:
        """The text of a conversation up to and with a message."""
        return self.renderer.text(conversation.messages[: number + 1], place, conversation.tools)

    def _rendered(self, conversation: Conversation, place: str) -> tuple[list[Rendered], Conversation]:
        """With the arguments of tool calls as objects, or as JSON text for a template that writes them as they come; and the conversation
        that the template was given."""
        texts = with_text_arguments(conversation)
        if texts is None:
            return rendered(self.renderer, conversation, self.ends, place), conversation
        try:
            found = rendered(self.renderer, conversation, self.ends, place)
        except DataError as error:
            try:
                return rendered(self.renderer, texts, self.ends, place), texts
            except DataError:
                raise error from None
        given = [*_strings([message.get("content") for message in conversation.messages])]
        is_python = any(
            # The row itself may have it, as in the result of a call.
            said in one.text and one.text.count(said) > sum(text.count(said) for text in given)
            for said in map(str, filter(None, arguments_of(conversation)))
            for one in found
        )
        return (rendered(self.renderer, texts, self.ends, place), texts) if is_python else (found, conversation)


def _learnt(found: Sequence[Rendered], with_marks: bool = False) -> dict[int, str]:
    """What is learnt of each turn, by the number of its message; `with_marks` also the marks of thoughts right before."""
    return {
        number: each.text[begin_of_marks(each.text, first) if with_marks else first : last]
        for each in found
        for number, (first, last) in zip(each.turns, each.spans, strict=True)
    }


def _with_parts(conversation: Conversation) -> Conversation:
    """The same conversation with each content as a list of one part."""
    parts = [
        {**message, "content": [{"type": "text", "text": message["content"]}]} if message.get("content") else message
        for message in conversation.messages
    ]
    return conversation._replace(messages=parts)


def _refuse_unlearnt(row: Row, place: str) -> None:
    """A turn with `weight: 0` contradicts a recipe that learns every token."""
    for column in ("messages", "prompt", "completion"):
        found = row.get(column)
        for number, message in enumerate(found if isinstance(found, list) else ()):
            if message.get("weight") == 0 or False in [message.get(flag) for flag in FLAGS]:
                reason = f"`{column}[{number}]` is not to be learnt, and `task.learn: all` learns every token"
                raise DataError(reason, where=place, hint="remove its `weight` or flag, or learn less with task.learn")


def _refuse_roles(conversation: Conversation, template: str, place: str) -> None:
    """A role that the template does not know is written as it stands, or not at all."""
    for message, field in zip(conversation.messages, conversation.places, strict=True):
        role = message["role"]
        if role not in ROLES and not _is_named(template, role):
            hint = f"rename it to one of {', '.join(ROLES)}"
            raise DataError(
                f"`{field}.role` is `{role}`, which the chat template does not name", where=place, hint=hint
            )


def _is_named(template: str, role: str) -> bool:
    return any(f"{quote}{role}{quote}" in template for quote in "\"'")


def _refuse_control_tokens(conversation: Conversation, place: str, control: Sequence[str], is_all: bool = True) -> None:
    """Text that spells a control token would become that token, and end or forge a turn; in contents, or wherever there is text."""
    named = [(f"{message['role']} message", message.get("content")) for message in conversation.messages]
    if is_all:
        for message, field in zip(conversation.messages, conversation.places, strict=True):
            named += [(f"`{field}.{name}`", value) for name, value in message.items() if name != "content"]
        named.append(("`tools`", conversation.tools))
    for name, value in named:
        for text in _strings(value):
            if token := next((token for token in control if token in text), None):
                said = name if name.startswith("`") else f"a {name}"
                raise DataError(f"{said} spells the control token `{token}`", where=place, hint="remove or respell it")


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
