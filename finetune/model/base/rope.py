"""RoPE scaling of a recipe, in the config of its base: a directory of links to the base's files, with that one file changed.

So everything that opens the base, writes a checkpoint or makes a package has the scaling without knowing of it.
"""

import json
import math
import re
import tempfile
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from finetune.errors import BaseError, explained, of_libraries
from finetune.model.base import view
from finetune.model.base.damaged import Json, name_of, read_json
from finetune.model.base.files import CONFIG
from finetune.model.base.load import load_config
from finetune.model.base.quiet import quiet
from finetune.model.rotary import entries
from finetune.recipe.schema import Recipe, Rope

ORIGINAL = "original_max_position_embeddings"
# What a scaling consists of. The rest of an entry stays: theta, the rotated share of a head, sections of several axes.
SCALING = frozenset(
    ["rope_type", "type", "factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"]
    + ["truncate", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor"]
)
BY_ORIGINAL = ("yarn", "longrope", "llama3")  # whose frequencies are a function of the original positions
CHANGED = frozenset(
    ["max_position_embeddings", ORIGINAL, "head_dim", "rope_parameters", "rope_scaling", "rope_theta", "_name_or_path"]
)
WITHIN = re.compile("sliding|chunked")  # layers that look no further than a window need no more positions


def scaled(directory: Path, rope: Rope) -> Path:
    """The base in `directory` with its rotary positions scaled. BaseError where its config takes no such scaling."""
    config = scaled_config(read_json(directory / CONFIG), load_config(directory), rope, name_of(directory))
    text = json.dumps(config, indent=2) + "\n"
    return view.view(view.SCALED, directory, {CONFIG: text}, view.origin(directory, name_of(directory)))


def unscaled(directory: Path) -> Path:
    """The directory whose rotary positions were scaled; any other one itself."""
    origin = view.origin_of(directory)
    return Path(origin["source"]) if origin and directory.parent.name == view.SCALED else directory


def positions_of(config: PretrainedConfig) -> int:
    """The longest row of a base; 0 where nothing bounds it. `dynamic` keeps the original positions in the config."""
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or 0
    factors = [entry["factor"] for entry in entries(config).values() if entry.get("rope_type") == "dynamic"]
    return int(longest * max(factors, default=1)) if longest > 0 else 0  # XLNet's -1 is no bound


def hint_for(config: PretrainedConfig, recipe: Recipe) -> str | None:
    """What to do about rows longer than the base's positions, or than those that a scaling gives; None where they are not rotary."""
    longest, rope, length = positions_of(config), recipe.base.rope, recipe.task.max_length
    if not entries(config) or not longest:
        return None
    if rope:
        return f"shorten it, or set base.rope.factor to {math.ceil(length / longest * rope.factor)}"
    return f"shorten it, or set base.rope, like {{rope_type: yarn, factor: {max(2, math.ceil(length / longest))}}}"


def scaled_config(raw: Json, config: PretrainedConfig, rope: Rope, where: str) -> Json:
    """A config as JSON with the scaling, in the spelling that it has for rotary settings: an older transformers reads it, too."""
    reaching = {name: entry for name, entry in entries(config).items() if not (name and WITHIN.search(name))}
    if not reaching:
        raise BaseError("has no rotary positions to scale", where=where, hint="remove base.rope")
    text = config.get_text_config()
    original = _original(text, next(iter(reaching.values())), rope, where)
    positions = original if rope.rope_type == "dynamic" else int(rope.factor * original)
    if int(rope.factor * original) <= positions_of(config):
        message = f"gives {int(rope.factor * original)} positions, and the base has {positions_of(config)} already"
        raise BaseError(message, where="base.rope.factor", hint="set a larger factor, or remove base.rope")
    changed = {name: _entry(entry, original, rope) for name, entry in reaching.items()}
    for spelled in (_as_spelled, _nested):
        candidate = json.loads(json.dumps(raw))
        section = _text_section(candidate, config)
        section |= _beside(text, positions, original)
        spelled(section, entries(config), changed)
        made = _read(candidate, config, changed, positions)
        if made is not None:
            _check_frequencies(made, changed, where)
            return candidate
    message, hint = f"its config takes no `{rope.rope_type}` scaling", "choose another base.rope.rope_type"
    raise BaseError(message, where=where, hint=hint)


def _beside(text: PretrainedConfig, positions: int, original: int) -> Json:
    """What changes in a config beside its rotary settings."""
    found: Json = {"max_position_embeddings": positions}
    if hasattr(text, ORIGINAL):
        found[ORIGINAL] = original  # Phi-3's, which counts more than the one in the entry
    of_layers = getattr(text, "per_layer_attributes", None) or ()
    if "head_dim" not in of_layers and getattr(text, "head_dim", 0) is None:
        # Mixtral's: transformers would multiply None by the share that is rotated
        found["head_dim"] = text.hidden_size // text.num_attention_heads
    return found


def _original(text: PretrainedConfig, entry: Json, rope: Rope, where: str) -> int:
    """The positions of the pretraining: of a base that is scaled already not those in its config."""
    if rope.original_max_position_embeddings:
        return rope.original_max_position_embeddings
    own = getattr(text, ORIGINAL, None) or entry.get(ORIGINAL)
    if own is None and entry.get("rope_type") != "linear":
        own = getattr(text, "max_position_embeddings", None)
    if not own or own < 1:
        message, hint = "does not say the positions of its pretraining", f"set base.rope.{ORIGINAL}"
        raise BaseError(message, where=where, hint=hint)
    return int(own)


def _entry(entry: Json, original: int, rope: Rope) -> Json:
    """The settings of a kind of layer with the scaling in place of its own."""
    given: Json = {
        "attention_factor": rope.attention_factor,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
        "truncate": rope.truncate,
        "short_factor": rope.short_factor,
        "long_factor": rope.long_factor,
        "rope_theta": rope.rope_theta,
    }
    if rope.rope_type == "llama3":
        # Those of Llama 3.1, unless given.
        given |= {"low_freq_factor": rope.low_freq_factor or 1.0, "high_freq_factor": rope.high_freq_factor or 4.0}
    if rope.rope_type in BY_ORIGINAL:
        given[ORIGINAL] = original
    kept = {key: value for key, value in entry.items() if key not in SCALING}
    given = {key: value for key, value in given.items() if value is not None}
    return {**kept, "rope_type": rope.rope_type, "factor": float(rope.factor), **given}


def _text_section(raw: Json, config: PretrainedConfig) -> Json:
    """The part of a config that is about the language model. Qwen2.5-VL's has it beside `vision_config`, in no section of its own."""
    text = config.get_text_config()
    names = [name for name in type(config).sub_configs if getattr(config, name, None) is text]
    section: Json = raw[names[0]] if names and names[0] in raw else raw
    return section


def _as_spelled(section: Json, own: dict[str | None, Json], changed: dict[str | None, Json]) -> None:
    """As transformers before version 5 wrote it, where the config is so spelled."""
    if "rope_parameters" in section:
        _nested(section, own, changed)
        return
    entry = dict(next(iter(changed.values())))
    section["rope_theta"] = entry.pop("rope_theta", section.get("rope_theta"))
    section["rope_scaling"] = {key: value for key, value in entry.items() if key in SCALING}


def _nested(section: Json, own: dict[str | None, Json], changed: dict[str | None, Json]) -> None:
    section.pop("rope_scaling", None)
    whole = {**own, **changed}
    section["rope_parameters"] = whole.get(None, whole)


def _read(
    raw: Json, config: PretrainedConfig, changed: dict[str | None, Json], positions: int
) -> PretrainedConfig | None:
    """What transformers makes of this config; None where that has not the scaling, or for other layers not what they had."""
    try:
        with quiet(), tempfile.TemporaryDirectory() as place:
            # from a file, as it will be: that has other spellings of some numbers
            Path(place, CONFIG).write_text(json.dumps(raw))
            made: PretrainedConfig = AutoConfig.from_pretrained(place)
    except of_libraries():  # such as Phi-3's, which takes longrope alone
        return None
    read, wanted = entries(made), {**entries(config), **changed}
    is_same = (
        _rest(made) == _rest(config)
        and read.keys() == wanted.keys()
        and all(read[name].get(key) == value for name, entry in wanted.items() for key, value in entry.items())
    )
    return made if is_same and made.get_text_config().max_position_embeddings == positions else None


def _rest(config: PretrainedConfig) -> Json:
    """The settings of the text that no scaling changes."""
    text = config.get_text_config()
    changed = {text.attribute_map.get(key, key) for key in CHANGED}
    return {key: value for key, value in text.to_dict().items() if key not in changed}


def _check_frequencies(config: PretrainedConfig, changed: dict[str | None, Json], where: str) -> None:
    """BaseError where transformers can make no frequencies of the scaling. It would take a list of one number for all of them."""
    text = config.get_text_config()
    for name, entry in changed.items():
        with quiet(), explained("cannot be scaled so", where, hint="check the numbers of base.rope"):
            pairs = len(ROPE_INIT_FUNCTIONS["linear"](text, layer_type=name)[0])
            for key in ("short_factor", "long_factor"):
                if key in entry and len(entry[key]) != pairs:
                    message = f"has {len(entry[key])} numbers, and the base rotates {pairs} pairs of dimensions"
                    raise BaseError(message, where=f"base.rope.{key}", hint=f"give {pairs} numbers")
            frequencies, attention = ROPE_INIT_FUNCTIONS[entry["rope_type"]](text, layer_type=name)
            if not (frequencies.isfinite().all() and math.isfinite(attention)):
                raise BaseError("gives frequencies that are not finite", where="base.rope", hint="check its numbers")
