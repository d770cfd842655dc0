"""Names of roles in rows of all kinds, and the ones that chat templates know."""

from collections.abc import Callable

from finetune.data.conversation import Conversation

ALIASES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "question", "customer"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "claude", "model", "bot", "chatbot"), "assistant"),
    **dict.fromkeys(("ai", "llm", "answer"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "environment"), "tool"),
    **dict.fromkeys(("function_response", "tool_response", "function_result", "tool_result"), "tool"),
}
"""A role in small letters -> the role of templates."""


def known_role(role: str) -> str:
    """The role of templates by any of its names; an unknown one stays."""
    return ALIASES.get(role.strip().lower(), role)


def with_known_roles(conversation: Conversation, is_named: Callable[[str], bool]) -> Conversation:
    """The conversation with roles like `developer` under the names that every template knows. `is_named` says of a role whether the
    template names it: then it stays. A turn never becomes one of the assistant here: what is learnt is decided already."""
    messages = [dict(message) for message in conversation.messages]
    for message in messages:
        role = message["role"]
        alias = known_role(role)
        if alias not in (role, "assistant") and not is_named(role):
            message["role"] = alias
    return conversation._replace(messages=messages)
