"""What the trainings of several ranks have in common: kinds of training, bases, and a recipe."""

METHODS = {
    "lora": {"name": "lora", "rank": 2, "alpha": 4},  # dropout is in test_exactness; experts take none
    "full": None,
    "frozen": {"name": "frozen", "freeze": ["model.layers.0.*"]},
}
SHARED_BASES = ("tied", "untied", "experts")
TRAIN = {"steps": 4, "batch_size": 9, "precision": "fp32", "micro_batch_tokens": 128}
CHECKPOINT = {"every": "2 steps", "keep": {"last": 9}}
