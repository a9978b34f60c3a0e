"""torchtune's run of side_by_side.py: its built-in recipe and builder, and the few components that feed it."""

import json
import sys
from pathlib import Path

import yaml
from safetensors.torch import load_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchtune.models.llama2 import lora_llama2
from torchtune.modules import TransformerDecoder

from benchmarks.training_job import CLIP_GRAD_NORM, LEARNING_RATE, LORA_ALPHA, LORA_RANK, TrainingJob
from custom_components.models.llama import ATTENTION_MODULES
from custom_components.models.shapes import shape_from_checkpoint


def command(job: TrainingJob) -> list[str]:
    config_path = Path(job.work_dir) / "torchtune.yaml"
    config_path.write_text(yaml.safe_dump(recipe_config(job)), encoding="utf-8")
    tune = Path(sys.executable).with_name("tune")
    return [str(tune), "run", "lora_finetune_single_device", "--config", str(config_path)]


def recipe_config(job: TrainingJob) -> dict[str, object]:
    """A config of torchtune 0.6.1's recipes/lora_finetune_single_device.py, after its llama2/7B_qlora_single_device."""
    index = Path(job.checkpoint_dir) / "model.safetensors.index.json"
    files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return {
        "output_dir": f"{job.work_dir}/run",
        "model": {
            "_component_": "benchmarks.side_by_side_torchtune.lora_llama2_from_adapter",
            "checkpoint_dir": job.checkpoint_dir,
            "adapter_path": job.torchtune_adapter_path,
            "lora_attn_modules": list(ATTENTION_MODULES),
            "apply_lora_to_mlp": True,
            "lora_rank": LORA_RANK,
            "lora_alpha": LORA_ALPHA,
        },
        "tokenizer": {
            "_component_": "torchtune.models.llama2.llama2_tokenizer",
            "path": f"{job.checkpoint_dir}/tokenizer.model",
        },
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": job.checkpoint_dir,
            "checkpoint_files": files,
            "recipe_checkpoint": None,
            "output_dir": f"{job.work_dir}/run",
            "model_type": "LLAMA2",
        },
        "resume_from_checkpoint": False,
        "save_adapter_weights_only": True,
        "dataset": {"_component_": "benchmarks.side_by_side_torchtune.tokenized_dataset", "path": job.rows_path},
        "seed": 0,
        "shuffle": False,
        "batch_size": job.batch_size,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "epochs": 1,
        "max_steps_per_epoch": job.num_steps,
        "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "lr": LEARNING_RATE, "weight_decay": 0.0},
        "lr_scheduler": {"_component_": "benchmarks.side_by_side_torchtune.constant_rate"},
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "clip_grad_norm": CLIP_GRAD_NORM,
        "compile": False,
        "metric_logger": {"_component_": "benchmarks.step_log.StepLog", "path": str(job.step_log_path)},
        "log_every_n_steps": 1,
        "log_peak_memory_stats": False,
        "device": "cpu",
        "dtype": "bf16",
        "enable_activation_checkpointing": job.checkpointing,
        "enable_activation_offloading": False,
    }


def lora_llama2_from_adapter(
    checkpoint_dir: str,
    adapter_path: str,
    lora_attn_modules: list[str],
    apply_lora_to_mlp: bool,
    lora_rank: int,
    lora_alpha: float,
) -> TransformerDecoder:
    """torchtune's own QLoRA builder, with a checkpoint's sizes and a given adapter.

    Its recipe takes an adapter only together with a checkpoint of its own to resume from, hence here.
    """
    shape = shape_from_checkpoint(Path(checkpoint_dir))
    model = lora_llama2(
        list(lora_attn_modules),
        apply_lora_to_mlp,
        vocab_size=shape.vocab_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        embed_dim=shape.embed_dim,
        max_seq_len=shape.max_seq_len,
        intermediate_dim=shape.intermediate_dim,
        norm_eps=shape.norm_eps,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        quantize_base=True,
    )
    unexpected = model.load_state_dict(load_file(adapter_path), strict=False).unexpected_keys
    assert not unexpected, unexpected
    return model


def tokenized_dataset(tokenizer: object, path: str) -> list[dict[str, list[int]]]:
    """The job's rows, which are what the recipe's collator takes."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def constant_rate(optimizer: Optimizer, num_training_steps: int, last_epoch: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 1.0, last_epoch)
