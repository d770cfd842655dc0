"""Models behind the OpenAI protocol on this machine: a look at them from other programs, not a product.

Not by `transformers serve` (5.23): it opens no adapter and no RUN@STEP, and answers 200 while it ignores `n`, `logprobs` and, where the
generation config says so, the temperature. It lets text forge turns, and drops the content beside tool calls.
"""
