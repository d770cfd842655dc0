"""What people would use instead, on the same rows: `contender.py JOB ANSWER`, JOB and ANSWER as JSON.

bare, bare-liger   a loop that does nothing but the arithmetic, without and with Liger's kernels
trainer            transformers' Trainer
sft                TRL's SFTTrainer
All: fused AdamW at one learning rate, autocast to bf16, clipping at 1, no saves.
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Job:
    def __init__(self, given: dict):
        self.kind: str = given["kind"]
        self.base: str = given["base"]
        self.batch: int = given["batch"]
        self.micro: int = given["micro"]
        self.steps: int = given["steps"]
        self.work: str = given["work"]
        self.is_lora: bool = given["is_lora"]
        self.dtype = getattr(torch, given["dtype"])
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        texts = [json.loads(line)["text"] for line in Path(given["rows"]).read_text().splitlines()]
        self.rows = [[*self.tokenizer(text)["input_ids"], 0] for text in texts][: self.batch * self.steps]

    def model(self) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=self.dtype, attn_implementation="sdpa").to(DEVICE)
        if self.is_lora:
            import peft

            settings = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
            model = peft.get_peft_model(model, peft.LoraConfig(**settings))
        if self.kind == "bare-liger":
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=model.get_base_model() if self.is_lora else model)
        return model.train()


def bare(job: Job) -> tuple[list[float], list[float]]:
    """Ends of the steps, and losses."""
    model, has_loss = job.model(), job.kind == "bare-liger"
    model.config.use_cache = False
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True)
    ends, losses = [], []
    for step in range(job.steps):
        total = 0.0
        for first in range(step * job.batch, (step + 1) * job.batch, job.micro):
            tokens = torch.tensor(job.rows[first : first + job.micro], device=DEVICE)
            with torch.autocast(DEVICE, torch.bfloat16):
                if has_loss:  # Liger's, without logits
                    loss = model(input_ids=tokens, labels=tokens).loss
                else:
                    logits = model(input_ids=tokens).logits[:, :-1]
                    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
            share = loss * job.micro / job.batch
            share.backward()
            total = total + share.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
        ends.append(time.time())
    return ends, losses


class Ends(TrainerCallback):
    """When each step ended on the device."""

    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.time())


def with_trainer(job: Job) -> tuple[list[float], list[float]]:
    from datasets import Dataset

    common = {
        "output_dir": f"{job.work}/trainer",
        "max_steps": job.steps,
        "per_device_train_batch_size": job.micro,
        "gradient_accumulation_steps": job.batch // job.micro,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "adamw_torch_fused",
        "bf16": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": DEVICE == "cpu",
    }
    if job.kind == "trainer":
        rows = Dataset.from_dict({"input_ids": job.rows, "labels": job.rows})
        trainer = Trainer(model=job.model(), args=TrainingArguments(**common), train_dataset=rows)
    else:
        from trl import SFTConfig, SFTTrainer

        own = {"max_length": len(job.rows[0]), "packing": False, "gradient_checkpointing": False}
        settings = SFTConfig(**common, **own, dataset_kwargs={"skip_prepare_dataset": True})
        rows = Dataset.from_dict({"input_ids": job.rows})
        trainer = SFTTrainer(model=job.model(), args=settings, train_dataset=rows, processing_class=job.tokenizer)
    ends = Ends()
    trainer.add_callback(ends)
    trainer.train()
    return ends.times, []


def main() -> None:
    job = Job(json.loads(sys.argv[1]))
    ends, losses = bare(job) if job.kind.startswith("bare") else with_trainer(job)
    found = {"ends": ends, "losses": losses}
    if DEVICE == "cuda":
        found["allocated_bytes"] = torch.cuda.max_memory_allocated()
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
