"""A run directory by its names: what lies in a run, and the plan that it has."""

import json
from pathlib import Path

from finetune.errors import RunError
from finetune.plan.plan import SCHEMA, Plan
from finetune.store import places


def load_plan(run: Path) -> tuple[Plan, dict]:
    """The plan of a run, and the facts recorded beside it."""
    path = run / "plan.json"
    damaged_hint = "restore it from a copy, or start a new run"
    try:
        record = json.loads(path.read_bytes())
        schema = record.pop("schema")
        if schema > SCHEMA:
            raise RunError("was written by a newer version of finetune", where=str(path), hint="upgrade finetune")
        facts, plan_id = record.pop("facts"), record.pop("plan_id")
        plan = Plan.model_validate(record)
    except (FileNotFoundError, NotADirectoryError):
        hint = "start it with `finetune train`"
        raise RunError("is not a run directory: it has no plan.json", where=str(run), hint=hint) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # pydantic's errors are ValueErrors
        reason = str(error).partition("\n")[0]
        raise RunError(f"is damaged: {reason}", where=str(path), hint=damaged_hint) from None
    if plan.plan_id != plan_id:
        raise RunError(
            "does not have the content its plan_id stands for",
            where=str(path),
            hint="it was edited: restore it from a copy",
        )
    places.opened(run, facts.get("places", {}))
    return plan, facts
