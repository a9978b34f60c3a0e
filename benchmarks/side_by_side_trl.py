"""TRL's run of side_by_side.py: SFTTrainer on a PEFT model over bitsandbytes' 4-bit base.

Runs in the environment of requirements-trl.txt, where this package is not installed.
"""

import sys
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from benchmarks.peft_model import quantized_peft_model
from benchmarks.step_log import StepLog
from benchmarks.training_job import CLIP_GRAD_NORM, LEARNING_RATE, TrainingJob


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
    arguments = SFTConfig(
        output_dir=f"{job.work_dir}/run",
        use_cpu=True,
        bf16=True,
        per_device_train_batch_size=job.batch_size,
        gradient_accumulation_steps=job.gradient_accumulation_steps,
        max_steps=job.num_steps,
        gradient_checkpointing=job.checkpointing,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP_GRAD_NORM,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": row["tokens"], "labels": row["labels"]} for row in job.rows()]
    trainer = SFTTrainer(
        model=quantized_peft_model(job.checkpoint_dir, job.adapter_dir, is_trainable=True),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=padding_only_tokenizer(),
        callbacks=[StepLogCallback(StepLog(str(job.step_log_path)))],
    )
    # SFTTrainer brings the adapters of a 4-bit model to bf16; the job asks for fp32 ones, and so Adam's moments.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.train()


def padding_only_tokenizer() -> PreTrainedTokenizerFast:
    """The rows are tokenized already; all that the trainer takes from a tokenizer is the padding."""
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


if __name__ == "__main__":
    main(TrainingJob.read(Path(sys.argv[1])))
