"""Tests that try a fault at every place, or very often, have two lengths. CI runs the short one, which takes every few of the places, always
the same. `scripts/test --long` takes all."""

import os
from typing import TypeVar

Some = TypeVar("Some")
IS_LONG = bool(os.environ.get("FINETUNE_LONG_TESTS"))


def length(short: Some, long: Some) -> Some:
    return long if IS_LONG else short
