"""This package's run of side_by_side.py: its own recipe, by its own command."""

import sys
from pathlib import Path

from benchmarks.training_job import BETA, CLIP_GRAD_NORM, LEARNING_RATE, LORA_ALPHA, LORA_RANK, TrainingJob

# The recipe and the config of each kind of run.
_RECIPES = {
    "lora": ("lora_single_device", "llama_qlora"),
    "dpo": ("lora_dpo_single_device", "tiny_dpo"),
    "full": ("full_single_device", "tiny_full"),
}


def command(job: TrainingJob) -> list[str]:
    recipe, config = _RECIPES[job.kind]
    of_adapter = {
        "init_adapter_from": job.adapter_dir,
        "lora_rank": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.0,
    }
    of_pairs = {"loss._component_": "custom_components.training.preference_losses.sigmoid", "loss.beta": BETA}
    overrides = {
        "checkpoint_dir": job.checkpoint_dir,
        "output_dir": f"{job.work_dir}/run",
        **({} if job.kind == "full" else of_adapter),
        **(of_pairs if job.kind == "dpo" else {}),
        "dataset_val": "null",
        "run_val_every_n_steps": "null",
        "max_seq_len": job.max_seq_len,
        "cache_dir": "null",
        "dataset.source": job.source,
        "dataset.max_rows": job.num_rows,
        "shuffle": "false",
        "epochs": 1,
        "max_steps_per_epoch": job.num_steps,
        "batch_size": job.batch_size,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "optimizer.lr": LEARNING_RATE,
        "optimizer.weight_decay": 0.0,
        "lr_scheduler._component_": "custom_components.training.schedules.constant",
        "warmup_ratio": 0.0,
        "clip_grad_norm": CLIP_GRAD_NORM,
        "device": "cpu",
        "dtype": "bf16",
        "enable_activation_checkpointing": str(job.checkpointing).lower(),
        "metric_logger._component_": "benchmarks.step_log.StepLog",
        "metric_logger.path": job.step_log_path,
    }
    tune = Path(sys.executable).with_name("tune")
    words = [str(tune), "run", f"recipes/{recipe}.py", "--config", f"configs/{config}.yaml"]
    return [*words, "--trust-components", "benchmarks", *(f"{key}={value}" for key, value in overrides.items())]
