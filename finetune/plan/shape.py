"""The sizes of a model that decide what its training needs, from its config."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Shape(NamedTuple):
    """What of a model's config decides the size of its activations."""

    layers: int
    hidden: int
    intermediate: int
    """Of one token, over all experts that it goes to, shared ones too."""
    vocabulary: int
    queries: int
    """Heads times their size."""
    keys: int
    """Key-value heads times their size."""
    is_tied: bool
    routed: int = 0
    """Of `intermediate`, that of experts which a router chooses."""
    experts: int = 0
    """Those that a token goes to."""
    not_linear: int = 0
    """Parameters of the text side that are neither in linear layers nor embeddings, like experts in one tensor."""
    summed: int = 0
    """Parameters to which an adapter's matrices are added before the product, as to those of experts."""
    scored: int = 0
    """Heads whose scores no fused kernel computes, so that all those of a row are in memory: soft-capped ones, and those with sinks."""
    is_capped: bool = False
    """Whether they are soft-capped."""
    has_fused_norms: bool = False
    has_fused_feed_forward: bool = False
    """Whether one kernel computes what stands between its products."""


def shape_of(config: "PretrainedConfig") -> Shape:
    """The shape in a transformers config, by the names its families use."""
    text = config.get_text_config()

    def size_of(*names: str) -> int:
        """The first of these that the config has; where layers differ, the largest."""
        return next((max(values) for name in names if (values := values_of(text, name))), 0)

    hidden = size_of("hidden_size", "d_model") or 1
    # without attention, states as wide as the model mix the tokens
    heads = size_of("num_attention_heads", "num_heads") or 1
    size = size_of("head_dim") or hidden // heads
    experts = size_of("num_experts_per_tok")
    wide = size_of("intermediate_size") or 4 * hidden
    each = size_of("moe_intermediate_size") or wide
    is_capped = bool(getattr(text, "attn_logit_softcapping", None))
    shared = size_of("shared_expert_intermediate_size") or size_of("n_shared_experts", "num_shared_experts") * each
    return Shape(
        layers=size_of("num_hidden_layers", "num_blocks") or 1,
        hidden=hidden,
        intermediate=experts * each + shared if experts else wide,
        vocabulary=size_of("vocab_size"),
        queries=heads * size,
        keys=(size_of("num_key_value_heads") or heads) * size,
        is_tied=bool(getattr(config, "tie_word_embeddings", False)),
        routed=experts * each,
        experts=experts,
        scored=heads * is_capped,
        is_capped=is_capped,
    )


def values_of(config: "PretrainedConfig", name: str) -> list[int]:
    """A size in a config, once, or once for each layer where layers differ; empty where the config has none."""
    if name in (getattr(config, "per_layer_attributes", None) or ()):
        found = [getattr(layer, name, None) for layer in config.per_layer_config]
    else:
        value = getattr(config, name, None)
        found = list(value) if isinstance(value, list | tuple) else [value]
    return [value for value in found if value]
