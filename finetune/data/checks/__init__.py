"""The checks of `finetune data check`, by name. A new one is a function or class in a file here, and a line in this table."""

from finetune.data.checks import broken_text, conversations, copies, markup, near_copies, secret_keys, texts, tokens
from finetune.data.checks.looked import Check, each

CHECKS: dict[str, Check] = {
    "refused": each("problem", "rows that cannot be read or trained on", tokens.refused),
    "empty": each("problem", "rows without text, and empty messages", texts.empty),
    "missing_values": each(
        "problem", "`nan`, `null`, `undefined` and the like in place of a text", texts.missing_values
    ),
    "nothing_learnt": each("problem", "rows of which no token is learnt", tokens.nothing_learnt),
    "cut_answers": each("problem", "answers whose end task.max_length cuts away", tokens.cut_answers),
    "short_answers": Check("problem", "answers of one character, where most are longer", texts.ShortAnswers),
    "echoes": each("problem", "answers that repeat the prompt", texts.echoes),
    "loops": each("problem", "words that repeat a dozen times in a row", texts.loops),
    "duplicates": Check("problem", "rows that say the same as an earlier one", copies.Duplicates),
    "near_duplicates": Check("problem", "rows that say nearly the same as an earlier one", near_copies.NearDuplicates),
    "conflicts": Check("problem", "different answers to one prompt", copies.Conflicts),
    "seen_holdout": Check("problem", "held-out rows that are trained on", copies.SeenHoldout),
    "near_holdout": Check("problem", "held-out rows that are nearly trained on", near_copies.NearHoldout),
    "broken_text": each("problem", "replacement, control and half characters", broken_text.broken),
    "mojibake": each("problem", "UTF-8 that was read as another encoding", broken_text.mojibake),
    "control_tokens": Check("problem", "text that spells a control token of the base", markup.ControlTokens),
    "foreign_tokens": Check("problem", "text that spells a control token of another template", markup.ForeignTokens),
    "prompt_formats": each("problem", "words of a prompt format, like `### Response:`", markup.prompts),
    "variables": each("problem", "variables of a prompt that were not filled in", texts.variables),
    "double_entities": each("problem", "text that was escaped for HTML twice", markup.double_entities),
    "secrets": each("problem", "keys, tokens and passwords of well-known forms", secret_keys.secret_keys),
    "tools": each(
        "problem", "calls of tools that a row does not offer, and results without a call", conversations.tools
    ),
    "cut_rows": each("remark", "rows whose end is cut away, with no learnt token in it", tokens.cut_rows),
    "unanswered": each("remark", "conversations that end with a message that is not learnt", conversations.unanswered),
    "entities": each("remark", "entities of HTML in text", markup.entities),
}
