"""What a base and a recipe cannot do together: rows beyond the base's positions, tokens beyond its embeddings, packages without a name."""

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from finetune.errors import Problem
from finetune.model import base
from finetune.plan.plan import PinnedBase
from finetune.recipe.load import LoadedRecipe


def problems(
    loaded: LoadedRecipe, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, pinned: PinnedBase
) -> list[Problem]:
    """What base and recipe cannot do together; all of it at once."""
    recipe, found = loaded.recipe, []
    text = config.get_text_config()
    longest = base.positions_of(config)
    # Beyond its positions a base gives nonsense or an index error.
    if 0 < longest < recipe.task.max_length:
        message = f"{recipe.task.max_length} is more than the base's {longest} positions"
        found.append(loaded.problem("task.max_length", message, base.rope_hint(config, recipe)))
    # Ids beyond the embedding would be an index error in the middle of an epoch.
    if (tokens := max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))) > text.vocab_size:
        message = f"its tokenizer has {tokens} tokens, its model only {text.vocab_size}"
        found.append(loaded.problem("base.checkpoint", message))
    if recipe.package.form == "adapter" and pinned.kind != "hub" and recipe.base.origin is None:
        found.append(
            loaded.problem(
                "package.form",
                "an adapter of a local base would name a base that others do not have",
                "set base.origin to the Hub checkpoint it is equal to, or use `merged`",
            )
        )
    return found
