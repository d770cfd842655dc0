"""The shapes of rows, by the names of `data.train[].format`. In a form the first one comes before all others; see `choice.py`."""

from finetune.data.shapes import alpaca, messages, prompt, sharegpt, text, tokens
from finetune.data.shapes.shape import Shape

SHAPES: dict[str, Shape] = {
    "messages": messages.SHAPE,
    "sharegpt": sharegpt.SHAPE,
    "alpaca": alpaca.SHAPE,
    "prompt": prompt.SHAPE,
    "text": text.SHAPE,
    "tokens": tokens.SHAPE,
}
