"""Norms, rotary positions and gated feed-forwards of decoder layers, each in one kernel."""

from finetune.model.fused import formulas, liger
from finetune.model.fused.found import Parts, parts_of
from finetune.model.fused.switch import Switch, apply, switch_of

__all__ = ["Parts", "Switch", "apply", "formulas", "liger", "parts_of", "switch_of"]
