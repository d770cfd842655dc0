"""Runs that read rows by older rules go on with them. This says what today's rules would read otherwise."""

from finetune.data.example import Example
from finetune.data.sources.open import located, open_source
from finetune.errors import DataError
from finetune.model import base
from finetune.plan.plan import ROW_RULES
from finetune.tasks import TASKS
from finetune.training.resolve import Resolved

FIRST_ROWS = 64  # of each source are looked at on resume, to say what older rules lose


def losses_of_older_rules(resolved: Resolved) -> list[str]:
    """What the rules for rows that a run began with lose of its first rows, in one line; none where they lose nothing."""
    plan, directory, tokenizer = resolved.plan, resolved.base_directory, resolved.tokenizer
    task = plan.recipe.task
    stops = base.stop_tokens(directory, tokenizer, task.stop_names)
    rendering = {} if resolved.template is None else {"template": resolved.template}
    old, new = (
        TASKS[task.name].encoder(tokenizer, task, stops, rules, **rendering) for rules in (plan.row_rules, ROW_RULES)
    )
    seen, losses = 0, []
    for source, pin in zip(plan.recipe.data.train, plan.train, strict=True):
        before, after = (
            open_source(located(source, pin), pin.revision, rules, task.row_form)
            for rules in (plan.row_rules, ROW_RULES)
        )
        for index in range(min(len(before), FIRST_ROWS)):
            place, seen = before.where(index), seen + 1
            try:
                [was], [now] = old([before[index]], [place]), new([after[index]], [place])
                if list(map(_values, was)) != list(map(_values, now)):
                    losses.append(f"{place}: is another text, or learnt in other parts")
            # The rules of today refuse this row, because they would lose a part of it.
            except DataError as error:
                losses.append(f"{place}: {error.message}")
    about = f"today's rules differ for {len(losses)} of the first {seen}: {losses[0] if losses else ''}"
    return [f"rows are read by the rules that the run began with; {about}"] if losses else []


def _values(example: Example) -> tuple[list[int], list[bool]]:
    return example.tokens.tolist(), example.supervised.tolist()
