"""The model's parts: weights (`base`), what is trained (`adapter`), `optimizer`, `losses`, `attention`."""
