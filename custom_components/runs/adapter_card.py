"""The model card of a run's adapter."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from custom_components.config.training_settings import TrainingSettings
from custom_components.datasets.sources import data_files
from custom_components.datasets.tokenized_rows import ChatDataset
from custom_components.models.builders import HUGGING_FACE_SPELLINGS
from custom_components.runs.metrics import read_metrics
from custom_components.runtime.errors import UserError
from custom_components.training.state import Progress
from custom_components.transforms.dialogs import chat_messages
from custom_components.transforms.templates import dialog_turns, prompt_template
from custom_components.weights.card import (
    FIRST_SECTION,
    LAST_SECTION,
    TAG,
    front_matter,
    hub_name,
    local_path,
    markdown_link,
    path_name,
    plain_text,
)


def adapter_card(
    settings: TrainingSettings,
    dataset: ChatDataset,
    dataset_val: ChatDataset | None,
    system_prompt: str | None,
    progress: Progress,
    metrics: Path,
) -> str:
    """The card of a finished run's adapter, as Markdown with front matter.

    Args:
        dataset, dataset_val: the rows trained on, and validated on.
        system_prompt: of dialogs that had none of their own.
        metrics: the run's metrics.jsonl.
    """
    base = hub_name(settings.checkpoint_dir)
    head = front_matter(
        settings.checkpoint_dir,
        relation="adapter",
        library_name="peft",
        tags=["lora", *(["qlora"] if settings.quantize_base else []), TAG],
        datasets=[summary.source for summary in dataset.summaries if _is_on_hub(summary.source)],
    )
    kind = "QLoRA" if settings.quantize_base else "LoRA"
    return "".join(
        [
            head,
            f"\n# {kind} adapter for {markdown_link(base) or local_path(settings.checkpoint_dir)}\n",
            f"\nTrained with `llama-lora-recipes`. {_which_step(progress)}\n",
            FIRST_SECTION,
            *(f"- {line}\n" for line in _data_lines(settings, dataset, dataset_val)),
            "\n## Prompt format\n",
            _prompt_format(settings.prompt_template, system_prompt),
            "\n## Training\n\n",
            *(f"- {name}: {plain_text(value)}\n" for name, value in _hyperparameters(settings, progress).items()),
            "\n## Losses\n\nIn nats per supervised token.\n\n",
            *(f"- {line}\n" for line in _loss_lines(progress, metrics)),
            LAST_SECTION,
            how_to_load_adapter(settings, base or f"path/to/{path_name(settings.checkpoint_dir)}"),
        ]
    )


def _is_on_hub(source: str) -> bool:
    try:
        return not data_files(source)
    except UserError:  # a file that has gone since it was read
        return False


def _which_step(progress: Progress) -> str:
    if progress.best_step is not None:
        return f"It is the state after step {progress.best_step} of {progress.num_steps}, the best by validation loss."
    return f"It is the state after the last of {progress.num_steps} steps."


def _data_lines(settings: TrainingSettings, dataset: ChatDataset, dataset_val: ChatDataset | None) -> Iterator[str]:
    source = settings.dataset.get("source")
    weights = {part["source"]: part.get("weight", 1) for part in source} if isinstance(source, list) else {}
    for summary in dataset.summaries:
        name = markdown_link(summary.source, "datasets/") if _is_on_hub(summary.source) else local_path(summary.source)
        weight = f", weight {weights[summary.source]:g}" if summary.source in weights else ""
        dropped = f" of {summary.num_rows}" if summary.num_kept < summary.num_rows else ""
        truncated = f", {summary.num_truncated} of them cut to the longest length" if summary.num_truncated else ""
        yield f"{name}{weight}: {summary.num_kept}{dropped} rows{truncated}"
    yield f"rows trained on: {len(dataset)}"
    if dataset_val is not None:
        yield f"rows validated on: {len(dataset_val)}"
    yield {
        "assistant": "supervised: the answers",
        "last_assistant": "supervised: the last answer of each dialog",
        "all": "supervised: prompts and answers",
    }[settings.train_on]


def _prompt_format(template: str | dict[str, str], system_prompt: str | None) -> str:
    """A dialog of placeholders as it is tokenized; `<s>` and `</s>` stand for BOS and EOS."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
    exchange = [{"role": "user", "content": "{question}"}, {"role": "assistant", "content": "{answer}"}]
    turns = dialog_turns(chat_messages([*system, *exchange, *exchange]), prompt_template(template))
    text = "".join(f"<s>{turn.prompt}{turn.answer}</s>" for turn in turns)
    name = f"`{template}`" if isinstance(template, str) else "One of its own"
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return (
        f"\n{name}. A dialog of two questions; `<s>` and `</s>` are the tokenizer's control tokens, and `</s>` ends an "
        f"answer:\n\n{fence}text\n{text}\n{fence}\n"
    )


def _hyperparameters(settings: TrainingSettings, progress: Progress) -> Mapping[str, object]:
    """By their names in the config, those that did something."""
    peft_names = {tune: peft for peft, tune in HUGGING_FACE_SPELLINGS.items()}
    modules = [peft_names.get(name, name) for name in settings.lora_attn_modules]
    modules += ["gate_proj", "up_proj", "down_proj"] if settings.apply_lora_to_mlp else []
    modules += ["lm_head"] if settings.apply_lora_to_output else []
    chosen = {
        "adapted modules": modules,
        "lora_rank": settings.lora_rank,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "use_rslora": settings.use_rslora or None,
        "use_dora": settings.use_dora or None,
        "base while training": "4-bit NF4 with double quantization" if settings.quantize_base else None,
        "optimizer steps": progress.num_steps,
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "packed": settings.packed or None,
        "max_seq_len": settings.max_seq_len,
        "optimizer": settings.optimizer["_component_"].rpartition(".")[2],
        **{f"optimizer.{key}": value for key, value in settings.optimizer.items() if key in _OPTIMIZER_KEYS},
        "lr_scheduler": settings.lr_scheduler["_component_"].rpartition(".")[2],
        "warmup_steps": settings.warmup_steps,
        "warmup_ratio": settings.warmup_ratio or None,
        "lora_plus_ratio": settings.lora_plus_ratio,
        "neftune_noise_alpha": settings.neftune_noise_alpha,
        "clip_grad_norm": settings.clip_grad_norm,
        "seed": settings.seed,
    }
    return {name: value for name, value in chosen.items() if value is not None}


_OPTIMIZER_KEYS = ("lr", "weight_decay", "betas", "eps")


def _loss_lines(progress: Progress, metrics: Path) -> Iterator[str]:
    steps = [record for record in read_metrics(metrics) if record.get("loss") is not None]
    num_tokens = sum(record["supervised_tokens"] for record in steps)
    mean = sum(record["loss"] * record["supervised_tokens"] for record in steps) / num_tokens
    yield f"training, last step: {steps[-1]['loss']:.4f}"
    yield f"training, mean over the tokens of all steps: {mean:.4f}"
    if progress.best_step is not None:
        yield f"validation, best, after step {progress.best_step}: {progress.best_val_loss:.4f}"


# The ranks that `vllm serve --max-lora-rank` takes: vllm-project/vllm, vllm/config/lora.py, MaxLoRARanks.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def how_to_load_adapter(settings: TrainingSettings, base: str) -> str:
    """Markdown.

    Args:
        base: what transformers and vLLM load: a name on the hub, or a path.
    """
    is_plain = not (settings.use_dora or settings.apply_lora_to_output)
    vllm_rank = next((rank for rank in _VLLM_RANKS if rank >= settings.lora_rank), None)
    if is_plain and vllm_rank is not None:
        fourth = f"""
vLLM:

```
vllm serve {base} --enable-lora --max-lora-rank {vllm_rank} --lora-modules tuned=path/to/adapter
```
"""
    else:
        fourth = f"""
transformers, with PEFT installed:

```python
model = AutoModelForCausalLM.from_pretrained("{base}")
model.load_adapter("path/to/adapter")
```
"""
    return f"""
llama-lora-recipes, which reads the prompt format from the adapter:

```
tune run recipes/generate.py --config configs/generate.yaml \\
  checkpoint_dir=path/to/{Path(base).name} adapter_dir=path/to/adapter prompt="..."
```

The same, merged into the base for tools that load no adapters:

```
tune run recipes/merge.py --config configs/merge.yaml \\
  checkpoint_dir=path/to/{Path(base).name} adapter_dir=path/to/adapter output_dir=path/to/merged
```

PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "path/to/adapter")
```
{fourth}"""
