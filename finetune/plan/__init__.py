"""The frozen plan, and forecasts from it. Pure: nothing here reads or writes a run."""

from finetune import also_a_command

also_a_command(__name__)
