"""The rows of the comparison: pieces of the standard library's source, with lengths that spread as conversations do.

Lengths are drawn from a log-normal distribution with a median of 180 and a ninth decile of 470 tokens, as a corpus of 4,000
conversations had. Four rows make an update; a draw of four is taken when together they have 900 to 1,024 tokens and fit into
1,024 positions, so that all updates are of one size. Everything is a function of the seed and of the interpreter's library.
"""

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from transformers import PreTrainedTokenizerBase

from finetune.data import pack

ROWS, FEWEST, MOST = 4, 900, 1024  # of an update
MU, SIGMA = 5.193, 0.749  # of the logarithm of a length: exp(MU) = 180, exp(MU + 1.2816 SIGMA) = 470
SHORTEST = 16


def steps(tokenizer: PreTrainedTokenizerBase, count: int, max_length: int) -> list[list[str]]:
    """The texts of each update; each has at most `max_length` tokens with the end token that follows it."""
    draw, source = random.Random(0), pieces(tokenizer)
    next(source)
    found: list[list[str]] = []
    while len(found) < count:
        lengths = drawn(draw, max_length)
        texts = [source.send(length - 1) for length in lengths]  # the end token is the last one
        if fits([len(tokenizer(text)["input_ids"]) + 1 for text in texts], max_length):
            found.append(texts)
    return found


def drawn(draw: random.Random, max_length: int) -> list[int]:
    """The lengths of an update's rows."""
    while True:
        lengths = [round(draw.lognormvariate(MU, SIGMA)) for _ in range(ROWS)]
        if min(lengths) >= SHORTEST and fits(lengths, max_length):
            return lengths


def fits(lengths: list[int], max_length: int) -> bool:
    is_of_size = FEWEST <= sum(lengths) <= MOST and max(lengths) <= max_length
    return is_of_size and len(pack.packed(lengths, max_length)) <= MOST // max_length


def pieces(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Send a number of tokens: the next piece of the library with about that many (cut text may be tokenized differently)."""
    wanted = yield ""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="ignore")
        if not ast.get_docstring(ast.parse(text)):
            continue  # generated tables
        spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        first = 0
        while first + wanted <= len(spans):
            piece = text[spans[first][0] : spans[first + wanted - 1][1]]
            first += wanted
            if piece.strip():
                wanted = yield piece
    raise ValueError("the standard library has too little text for so many updates")


def facts(lengths: list[list[int]]) -> dict[str, object]:
    """What the rows look like; `lengths` by update."""
    flat = sorted(length for step in lengths for length in step)
    widths = [len(step) * max(step) for step in lengths]
    return {
        "rows": len(flat),
        "median": median(flat),
        "ninth_decile": flat[int(0.9 * len(flat))],
        "longest": flat[-1],
        "tokens_of_update": sum(flat) / len(lengths),
        "share_of_padded_positions": sum(flat) / sum(widths),
    }
