"""TRL's SFTTrainer: `sft.py JOB ANSWER FORM`, padded or packed. Settings as for Trainer, and TRL's own where it has others.

padded  TRL's collator, filled up to the longest row
packed  TRL's `pack_dataset` with its strategy `bfd` into sequences of the cell's length, and its padding-free collator. It is told
        to pack the rows of one step together, so that every contestant trains on the same rows in a step; nothing is padded.

Gradient checkpointing, on by default in TRL, is as the cell says. TRL's own chunked log-probabilities, its entropy and its token
accuracy belong to it and stay.
"""

import sys
import warnings
from importlib.metadata import version

import transformers
from datasets import Dataset
from job import given
from trainer import Clock, settings, trained
from transformers import AutoTokenizer

INSTALL = """TRL is not installed for this interpreter. It is no part of the set-up: install it with
    .venv/bin/python -m pip install '.[bench]'
or into a virtual environment of its own, and name that one's interpreter: throughput.py --python PATH"""

try:
    from trl import SFTConfig, SFTTrainer, pack_dataset
except ModuleNotFoundError as error:
    sys.exit(INSTALL if error.name == "trl" else str(error))


def main() -> None:
    job, answer, (form,) = given()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    answer.versions["trl"] = version("trl")
    steps = job.examples()
    dataset = Dataset.from_dict({"input_ids": [row.tolist() for step in steps for row in step]})
    choices = settings(job)
    if form == "packed":
        dataset = pack_dataset(dataset, job.max_length, "bfd", {"batch_size": job.rows_of_step})
        if len(dataset) % job.steps:
            raise ValueError(f"{len(dataset)} sequences do not divide into {job.steps} steps")
        choices["per_device_train_batch_size"] = len(dataset) // job.steps
    trainer = SFTTrainer(
        model=job.model(),
        args=SFTConfig(
            **choices,
            max_length=job.max_length,
            packing=form == "packed",
            packing_strategy="bfd",
            shuffle_dataset=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(job.base),
    )
    trained(trainer, Clock(job, answer))


if __name__ == "__main__":
    main()
