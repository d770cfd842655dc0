"""Hugging Face's Trainer, as its documentation has it: `trainer.py JOB ANSWER`.

Right-padded batches, fused AdamW, autocast (`bf16=True`), no logging, no saving, no evaluation, no tokens counted. Its own
sampler in sequential order, because all contestants must see the same rows in a step; the first label of each row is left out,
so that its count of labels is right. Its losses are kept, not logged.
"""

import transformers
from datasets import Dataset
from job import Answer, Job, given
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments


def settings(job: Job) -> dict:
    """Of Trainer and of trainers that are built on it."""
    return {
        "output_dir": f"{job.rows}/output",
        "max_steps": job.steps,
        "per_device_train_batch_size": job.rows_of_step,
        "gradient_accumulation_steps": 1,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": job.is_bf16,
        "gradient_checkpointing": job.is_checkpointed,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if job.is_checkpointed else None,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "dataloader_num_workers": 0,  # on two cores a worker takes a core from the arithmetic
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


class Clock(TrainerCallback):
    """Writes down when a step has ended: the update is made, the gradients are gone."""

    def __init__(self, job: Job, answer: Answer):
        self.tokens = [sum(map(len, rows)) for rows in job.examples()]
        self.answer = answer
        self.losses: list = []

    def on_step_end(self, *_: object, **__: object) -> None:
        number = len(self.answer.ends)
        self.answer.step(float(self.losses[number]), self.tokens[number])


def trained(trainer: Trainer, clock: Clock) -> None:
    """Trains, and keeps the loss of each step as the trainer computes it."""
    training_step = trainer.training_step

    def keeping(*arguments: object, **named: object) -> object:
        loss = training_step(*arguments, **named)
        clock.losses.append(loss.detach())
        return loss

    trainer.training_step = keeping
    trainer.add_callback(clock)
    trainer.train()
    clock.answer.write()


def main() -> None:
    job, answer, _ = given()
    transformers.logging.set_verbosity_error()
    model = job.model()
    if job.is_checkpointed and job.is_lora:
        model.enable_input_require_grads()
    rows = [[int(token) for token in row] for step in job.examples() for row in step]
    dataset = Dataset.from_dict({"input_ids": rows, "labels": [[-100, *row[1:]] for row in rows]})
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**settings(job)),
        train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(job.base), label_pad_token_id=-100),
    )
    trained(trainer, Clock(job, answer))


if __name__ == "__main__":
    main()
