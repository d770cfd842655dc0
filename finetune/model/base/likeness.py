"""Whether two tokenizers make the same tokens."""

from transformers import PreTrainedTokenizerBase

TEXTS = (
    "Hello, world!",
    "  two  blanks\tand a tab\n\nand lines",
    "naïve café, 東京, 🙂",
    "def f(x):\n    return x ** 2",
    "1234567890 <|x|> </s>",
)


def difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """The first difference between two tokenizers; None if they make the same tokens."""
    control = list(one.all_special_tokens)
    texts = [*TEXTS, *(f"a{token}b {token} c" for token in control), "".join(control)]
    for what, look in (
        ("ids of a text", lambda tokenizer: tokenizer(texts)["input_ids"]),
        ("special tokens", lambda tokenizer: tokenizer.special_tokens_map),
        ("number of tokens", len),
        ("splitting of special tokens", lambda tokenizer: tokenizer.split_special_tokens),
        ("vocabulary or rules", lambda tokenizer: tokenizer.backend_tokenizer.to_str()),
    ):
        if look(one) != look(other):
            return what
    return None
