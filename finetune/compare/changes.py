"""The rows that changed most between two models, with their texts and answers."""

from collections.abc import Sequence

import numpy as np

from finetune.compare.paired import Paired
from finetune.compare.shown import ChangedRow
from finetune.store.evaluations import Evaluation


def changed_rows(
    found: Paired, evaluations: Sequence[Evaluation], baseline: int, model: int, count: int
) -> list[ChangedRow]:
    """Those that make the most of the difference, the largest change first; without texts yet."""
    changes = np.abs(found.sums[model] - found.sums[baseline])
    places = np.argsort(-np.nan_to_num(changes, nan=np.inf), kind="stable")[:count]
    rows: list[ChangedRow] = []
    for place in places[changes[places] != 0].tolist():
        over = float(found.weights[place])
        row: ChangedRow = {
            "row": int(found.rows[place]),
            "a": float(found.sums[baseline, place]) / over,
            "b": float(found.sums[model, place]) / over,
            "tokens": int(over) if found.measure["per"] == "tokens" else 0,
            "text": None,
        }
        for key, evaluation in (("answer_a", evaluations[baseline]), ("answer_b", evaluations[model])):
            if evaluation.answers is not None:
                own = int(np.flatnonzero(evaluation.contents == found.contents[place])[0])
                row[key] = evaluation.answers[own]  # type: ignore[literal-required]
        rows.append(row)
    return rows
