"""A small model of a base's kind: every sort of layer, random weights, a thousandth of the size.

Use it to try properties of the kind in a second (do rows stay apart, does an adapter fit). Its numbers mean nothing for the base.
"""

import re
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from finetune.errors import BaseError, explained
from finetune.model.base.loading_class import class_of, made
from finetune.model.base.quiet import quiet

VOCABULARY = 320
EDGE = 16  # where a window, a chunk or an original context ends, if the base's own end lies within its rows
BEYOND = 512  # where it ends, if no row gets there
LAYERS = re.compile(
    r"num_hidden_layers|n_layers?|num_layers|(num_)?(de|en)coder_layers|num_blocks|num_global_layers|num_layers_per_stack|conf_num_hidden_layers|depth"
)
EDGES = re.compile(
    r"(.*_)?sliding_window(_size)?|(.*_)?chunk_size|(local_)?attention_window(_size|_len)?|window_size|keep_window_size|local_attention"
    r"|original_max_position_embeddings|index_topk|rel_extent"
)
POSITIONS = re.compile(r"(.*_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length")
# A key that the whole of a pattern matches gets at most that size.
SIZES = {
    r"(.*_)?(vocab(ulary)?_size(_per_layer_input)?|vocab|codebook_size|ngram_vocab_size_base)": VOCABULARY,
    r".*(key_value|kv|num_key)_heads|kv_n_heads|num_query_groups": 2,
    r"(.*_)?(attention|num|n|num_value|value)_heads?|n_heads?": 4,
    r"(.*_)?head_dim|d_head|d_kv|kv_channels|dim_head|attention_head_size|rotary_dim|query_pre_attn_scalar": 8,
    r"(.*_)?intermediate_size(_mlp)?|(.*_)?ffn_(dim|hidden_size)|dff|d_ff|dim_ff|d_inner|feed_forward_size|mlp_dim": 48,
    r"(num|n)_(local_|routed_)?experts|moe_num_experts": 4,
    r"num_experts_per_tok(en)?|moe_k|moe_top_?k": 2,
    r"n_group|topk_group|num_expert_group|n_groups|mamba_n_?groups": 1,
    r"(.*_)?lora_rank|.*_rank": 8,
    r"mamba_d_state|.*state_size": 8,
    r"(.*_)?hidden_size(_per_layer_input|_global)?|d_model|n_embd|emb_dim|(.*_)?embedding_(dim|size)|word_embed_proj_dim|lru_width"
    r"|(.*_)?embed_dim|dim_model_base": 32,
}
RULES = [(re.compile(pattern), size) for pattern, size in SIZES.items()]
Facts = dict[str, Any]
"""A config as JSON."""
WAYS = 3  # to choose layers, see `_layers`


def model_like(config: PretrainedConfig, max_length: int, **options: object) -> PreTrainedModel:
    """A small model of the kind of `config`, in fp32 and eval mode; options go to transformers. BaseError if none can be made.

    `max_length` is the longest row of the training. A limit within it (a window, a chunk) is also within the small model's rows.
    """
    tried = []
    for way in range(WAYS):
        try:
            # quiet: a yarn of a small context seems wrong to transformers
            with quiet(), explained("cannot be made small", config.model_type):
                return _model(shrunk(config, max_length, way), options)
        except BaseError as error:
            tried.append(error)
    raise tried[0]


def _model(config: PretrainedConfig, options: dict[str, object]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # not the type of the base's files: rounded to 8 bits, rows that stay apart differ as much as rows that are mixed
        model = made(class_of(config), config, dtype=torch.float32, **options).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)  # else what starts as zero has no part in it
            model(input_ids=torch.arange(2, 10)[None], use_cache=False)
    return model


def shrunk(config: PretrainedConfig, max_length: int, way: int = 0) -> PretrainedConfig:
    """A small copy of a config; `way` says how to choose layers."""
    facts = config.to_dict()
    parts = [name for name in type(config).sub_configs if isinstance(getattr(config, name, None), PretrainedConfig)]
    changes: Facts = {name: shrunk(getattr(config, name), max_length, way) for name in parts}
    count = next((facts[name] for name in facts if LAYERS.fullmatch(name) and isinstance(facts[name], int)), 0)
    lists = {name: value for name, value in facts.items() if isinstance(value, list) and len(value) == count > 1}
    numbers = {
        name for name, value in lists.items() if value == list(range(count))
    }  # which layers, and it is all of them
    apart = {int(layer): changed for layer, changed in (facts.get("per_layer_config") or {}).items()}
    values = [value for name, value in lists.items() if name not in numbers]
    kept = _layers([*values, [apart.get(layer) for layer in range(count)]], count, way)
    for name, value in facts.items():
        if name in parts or name in ("id2label", "label2id"):
            continue
        if name == "per_layer_config":
            changes[name] = {
                at: _smaller(name, apart[here], max_length) for at, here in enumerate(kept) if here in apart
            }
        elif name in numbers:
            changes[name] = list(range(len(kept)))
        elif name in lists:
            changes[name] = [_smaller(name, value[place], max_length) for place in kept]
        elif LAYERS.fullmatch(name) and isinstance(value, int):
            changes[name] = min(value, len(kept))
        else:
            changes[name] = _smaller(name, value, max_length)
    changes |= _not_grouped(facts)
    changes |= _consistent(facts, changes)
    changes |= _rotary(facts, facts | changes, max_length)
    changes |= _sections(facts, changes)
    kept_facts = {name: value for name, value in facts.items() if name not in changes and name not in UNUSED}
    return type(config)(**kept_facts, **changes)


def _rotary(facts: Facts, small: Facts, max_length: int) -> Facts:
    """Settings of rotary positions: a factor for each pair of dimensions, and the context of `dynamic`, which is that of the model."""
    settings = small.get("rope_parameters")
    if not isinstance(settings, dict):
        return {}
    found = {key: _factors(value, small) for key, value in _factors(settings, small).items()}
    changes: Facts = {"rope_parameters": found}
    positions, kinds = facts.get("max_position_embeddings"), [found, *found.values()]
    if positions and any(isinstance(kind, dict) and kind.get("rope_type") == "dynamic" for kind in kinds):
        changes["max_position_embeddings"] = min(positions, EDGE if positions < max_length else BEYOND)
    return changes


def _factors(settings: Any, small: Facts) -> Any:
    if not isinstance(settings, dict):
        return settings
    size = small.get("head_dim") or small.get("hidden_size", 0) // (small.get("num_attention_heads") or 1)
    pairs = int(size * settings.get("partial_rotary_factor", 1.0)) // 2
    cut = {key: value[:pairs] for key, value in settings.items() if key in ("short_factor", "long_factor")}
    return {**settings, **cut}


def _not_grouped(facts: Facts) -> Facts:
    heads = facts.get("num_attention_heads")
    return {"num_key_value_heads": min(heads, 4)} if heads and facts.get("num_key_value_heads") == heads else {}


def _consistent(facts: Facts, small: Facts) -> Facts:
    """Sizes computed by families from others."""
    found: Facts = {}
    hidden: Any = small.get("hidden_size")
    if total := facts.get("attention_hidden_size"):
        found["attention_hidden_size"] = hidden * max(1, total // facts["hidden_size"])
        if facts.get("attention_head_dim"):
            found["attention_head_dim"] = found["attention_hidden_size"] // small["num_attention_heads"]
    if facts.get("qk_head_dim"):
        found["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    for heads, size, expand in STATES:
        if facts.get(heads) and facts.get(size) and facts.get(expand):
            found[size] = small[expand] * hidden // small[heads]
    if facts.get("mamba_d_ssm"):
        found["mamba_d_ssm"] = small["mamba_n_heads"] * found["mamba_d_head"]
    return found


def _sections(facts: Facts, small: Facts) -> Facts:
    """Shares of a head's rotated channels for time, height and width (M-RoPE, arXiv 2409.12191), of a smaller head."""
    rope = small.get("rope_parameters")
    if not isinstance(rope, dict) or not isinstance(shares := rope.get("mrope_section"), list):
        return {}
    real, tiny = (
        of.get("head_dim") or of["hidden_size"] // of["num_attention_heads"] for of in (facts, {**facts, **small})
    )
    edges = [round(sum(shares[:place]) * tiny / real) for place in range(len(shares) + 1)]
    sections = [end - start for start, end in zip(edges[:-1], edges[1:], strict=True)]
    return {"rope_parameters": rope | {"mrope_section": sections}}


UNUSED = ("model_type", "transformers_version", "_name_or_path")
# heads, their size, and how much wider than the model they are together
STATES = (
    ("num_heads", "head_dim", "expand"),
    ("mamba_n_heads", "mamba_d_head", "mamba_expand"),
    ("mamba_num_heads", "mamba_head_dim", "expand"),
    ("n_mamba_heads", "mamba_headdim", "mamba_expand"),
)


def _smaller(name: str, value: object, max_length: int) -> object:
    if isinstance(value, dict):
        return {key: _smaller(str(key), item, max_length) for key, item in value.items()} | _not_grouped(value)
    if isinstance(value, list):
        return [_smaller(name, item, max_length) for item in value]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if EDGES.fullmatch(name):
        return min(value, EDGE if value < max_length else BEYOND)
    if POSITIONS.fullmatch(name):
        return min(value, 2 * BEYOND)
    if re.fullmatch(r"(.*_)?(token_id|token_index)", name):
        return value if value < 256 else 260 + value % 60  # an image's or a sound's: no text has them
    return min([value, *(size for pattern, size in RULES if pattern.fullmatch(name))][:2])


def _layers(lists: list[list[Any]], count: int, way: int) -> list[int]:
    """The layers to keep: the first ones with every value of every list, the first few, or all."""
    if way == 2:
        return list(range(count))
    if way == 1:
        return list(range(min(count, 8)))
    seen: set[tuple[int, str]] = set()
    kept = []
    for place in range(count):
        values = {(number, str(each[place])) for number, each in enumerate(lists)}
        if not values <= seen:
            kept.append(place)
            seen |= values
    rest = [place for place in range(count) if place not in kept]
    return sorted(kept + rest[: max(0, 2 - len(kept))])
