"""What of `weight`, `epochs`, `order` and `temperature` in the section `data` does not fit together."""

from finetune.recipe.schema.data import Data


def problem(data: Data) -> str | None:
    """As `key: message`."""
    return next((found for rule in (_weights, _stages, _epochs, _temperature) if (found := rule(data))), None)


def _weights(data: Data) -> str | None:
    has_weight = [source.weight is not None for source in data.train]
    if any(has_weight) and not all(has_weight):
        return "data.train: some sources have a `weight` and some do not; give all of them one, or none"
    return None


def _stages(data: Data) -> str | None:
    stages = [source.stage_weights for source in data.train if source.stage_weights]
    is_curriculum, has_weight = data.order == "curriculum", data.train[0].weight is not None
    if stages and not is_curriculum:
        return "data.train: a list of weights needs `data.order: curriculum`"
    if is_curriculum and has_weight and len({*map(len, stages)}) + len(data.train) - len(stages) > 1:
        return "data.train: a curriculum needs lists of weights of one length, a weight for each stage, or no `weight`"
    if stages and not all(any(weights) for weights in zip(*stages, strict=True)):
        return "data.train: a stage in which every weight is 0 draws nothing"
    return None


def _epochs(data: Data) -> str | None:
    if isinstance(data.holdout, list) and any(source.epochs is not None for source in data.holdout):
        return "data.holdout: `epochs` has no meaning for held-out rows"
    if data.train[0].weight is not None and any(source.epochs is not None for source in data.train):
        return "data.train: `weight` is the part of a source, `epochs` its amount; give one of the two"
    return None


def _temperature(data: Data) -> str | None:
    if data.temperature == 1:
        return None
    if data.order == "curriculum":
        return "data.temperature: has no meaning for `curriculum`"
    if any(source.weight is not None or source.epochs is not None for source in data.train):
        return "data.temperature: makes weights from the sizes of sources; give no `weight` and no `epochs`"
    return None
