"""TRL's run of side_by_side.py, or transformers'.

SFTTrainer or DPOTrainer on a PEFT model over bitsandbytes' 4-bit base, or transformers' Trainer on the whole model.
Runs in the environment of requirements-trl.txt, where this package is not installed.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from benchmarks.peft_model import quantized_peft_model
from benchmarks.step_log import StepLog
from benchmarks.training_job import BETA, CLIP_GRAD_NORM, LEARNING_RATE, TrainingJob


class StepLogCallback(TrainerCallback):
    """Passes the trainer's log of every step on to a step log."""

    def __init__(self, step_log: StepLog) -> None:
        self._step_log = step_log

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: object,
    ) -> None:
        if "loss" in logs:
            self._step_log.log_dict(logs, state.global_step)


def main(job: TrainingJob) -> None:
    trainer = {"lora": trainer_of_rows, "dpo": trainer_of_pairs, "full": trainer_of_model}[job.kind](job)
    trainer.add_callback(StepLogCallback(StepLog(str(job.step_log_path))))
    trainer.train()


def common(job: TrainingJob) -> dict[str, Any]:
    """The arguments of every trainer."""
    return {
        "output_dir": f"{job.work_dir}/run",
        "use_cpu": True,
        "per_device_train_batch_size": job.batch_size,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "max_steps": job.num_steps,
        "gradient_checkpointing": job.checkpointing,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": CLIP_GRAD_NORM,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "dataloader_pin_memory": False,
    }


def trainer_of_rows(job: TrainingJob) -> SFTTrainer:
    arguments = SFTConfig(**common(job), bf16=True, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
    trainer = SFTTrainer(
        model=quantized_peft_model(job.checkpoint_dir, job.adapter_dir, is_trainable=True),
        args=arguments,
        train_dataset=dataset_of_rows(job),
        processing_class=padding_only_tokenizer(),
    )
    bring_adapter_to_fp32(trainer.model)
    return trainer


class TokenizedPairsTrainer(DPOTrainer):
    """Takes pairs that are tokenized already, as SFTTrainer does with `skip_prepare_dataset`."""

    def _prepare_dataset(self, dataset: Dataset, *_: object, **__: object) -> Dataset:
        return dataset


def trainer_of_pairs(job: TrainingJob) -> DPOTrainer:
    arguments = DPOConfig(
        **common(job), bf16=True, beta=BETA, loss_type="sigmoid", precompute_ref_log_probs=True, max_length=None
    )
    trainer = TokenizedPairsTrainer(
        model=quantized_peft_model(job.checkpoint_dir, job.adapter_dir, is_trainable=True),
        args=arguments,
        train_dataset=Dataset.from_list([pair_of_ids(pair) for pair in job.rows()]),
        processing_class=padding_only_tokenizer(),
    )
    bring_adapter_to_fp32(trainer.model)
    return trainer


def pair_of_ids(pair: dict[str, dict[str, list[int]]]) -> dict[str, list[int]]:
    """Divide the dialogs of a pair into prompt and completions: all that is supervised is one answer, at the end."""
    start = {name: sum(label < 0 for label in row["labels"]) for name, row in pair.items()}
    assert pair["chosen"]["tokens"][: start["chosen"]] == pair["rejected"]["tokens"][: start["rejected"]]
    completions = {f"{name}_ids": row["tokens"][start[name] :] for name, row in pair.items()}
    return {"prompt_ids": pair["chosen"]["tokens"][: start["chosen"]], **completions}


def trainer_of_model(job: TrainingJob) -> Trainer:
    """Train all weights in bf16 by transformers alone, without an autocast."""
    tokenizer = padding_only_tokenizer()
    return Trainer(
        model=AutoModelForCausalLM.from_pretrained(job.checkpoint_dir, dtype=torch.bfloat16),
        args=TrainingArguments(**common(job), optim="adamw_torch_fused"),
        train_dataset=dataset_of_rows(job),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )


def dataset_of_rows(job: TrainingJob) -> Dataset:
    return Dataset.from_list([{"input_ids": row["tokens"], "labels": row["labels"]} for row in job.rows()])


def bring_adapter_to_fp32(model: nn.Module) -> None:
    """TRL brings the adapters of a 4-bit model to bf16; the job asks for fp32 ones, and so Adam's moments."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def padding_only_tokenizer() -> PreTrainedTokenizerFast:
    """The rows are tokenized already; all that the trainer takes from a tokenizer is the padding."""
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


if __name__ == "__main__":
    main(TrainingJob.read(Path(sys.argv[1])))
