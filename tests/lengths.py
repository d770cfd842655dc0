"""Tests that try a fault at every place, or very often, have two lengths. CI runs the short one: a fair part of the places, chosen so that
another part of them comes with other numbers. `scripts/test --long` tries all of them."""

import os
from typing import TypeVar

Some = TypeVar("Some")
IS_LONG = bool(os.environ.get("FINETUNE_LONG_TESTS"))


def length(short: Some, long: Some) -> Some:
    return long if IS_LONG else short
