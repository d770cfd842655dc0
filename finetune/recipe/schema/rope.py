"""The section `base.rope`: how rotary positions are stretched beyond those that the base has.

Its keys have the names that transformers gives them in `rope_parameters` of a config.
"""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from finetune.recipe.schema.values import Section

# The keys of each type, beside those of every type; the ones that it needs first.
NEEDED = {"longrope": ("short_factor", "long_factor")}
OWN = {
    "linear": (),
    "dynamic": (),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("short_factor", "long_factor", "attention_factor"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}


class Rope(Section):
    """RoPE scaling, for rows beyond the base's positions. Checkpoints and packages have it in their config."""

    rope_type: Literal["yarn", "longrope", "dynamic", "linear", "llama3"]
    """`yarn` (Peng et al. 2023, arXiv 2309.00071), `longrope` (Ding et al. 2024, arXiv 2402.13753), `dynamic` (NTK by the length of each row), `linear` (Chen et al. 2023, arXiv 2306.15595), or `llama3` (that of Llama 3.1)."""
    factor: float = Field(gt=1, le=1024)
    """How many times the original positions the longest row may have."""
    original_max_position_embeddings: PositiveInt | None = None
    """Positions of the pretraining. Default: those in the base's config."""
    rope_theta: float | None = Field(default=None, gt=0)
    """Base period of the rotation. Default: the base's own."""
    attention_factor: float | None = Field(default=None, gt=0)
    """`yarn`, `longrope`: scales the attention. Default: computed from `factor`."""
    beta_fast: float | None = Field(default=None, gt=0)
    """`yarn`: dimensions with more rotations than this keep their frequency. Default: 32."""
    beta_slow: float | None = Field(default=None, gt=0)
    """`yarn`: dimensions with fewer rotations than this are interpolated. Default: 1."""
    mscale: float | None = Field(default=None, gt=0)
    """`yarn`: numerator of the attention factor, as DeepSeek has it."""
    mscale_all_dim: float | None = Field(default=None, gt=0)
    """`yarn`: denominator of the attention factor, as DeepSeek has it."""
    truncate: bool | None = None
    """`yarn`: round the limits between dimensions. Default: true."""
    short_factor: list[float] | None = None
    """`longrope`: a divisor of each frequency in rows up to the original positions."""
    long_factor: list[float] | None = None
    """`longrope`: a divisor of each frequency in longer rows."""
    low_freq_factor: float | None = Field(default=None, gt=0)
    """`llama3`: wavelengths above the original positions over this are divided by `factor`. Default: 1."""
    high_freq_factor: float | None = Field(default=None, gt=0)
    """`llama3`: wavelengths below the original positions over this stay. Default: 4."""

    @model_validator(mode="after")
    def _fits_its_type(self) -> "Rope":
        for key in dict.fromkeys(key for keys in OWN.values() for key in keys):
            if getattr(self, key) is not None and key not in OWN[self.rope_type]:
                raise ValueError(f"`{key}` has no meaning for `{self.rope_type}`")
        if missing := [key for key in NEEDED.get(self.rope_type, ()) if not getattr(self, key)]:
            raise ValueError(f"`{self.rope_type}` needs `{missing[0]}`")
        if not all(0 < each < float("inf") for each in (*(self.short_factor or ()), *(self.long_factor or ()))):
            raise ValueError("`short_factor` and `long_factor` need numbers over 0")
        if not (self.low_freq_factor or 1.0) < (self.high_freq_factor or 4.0):
            raise ValueError("`high_freq_factor` must be above `low_freq_factor`")
        if not (self.beta_slow or 1.0) < (self.beta_fast or 32.0):
            raise ValueError("`beta_fast` must be above `beta_slow`")
        return self
