"""The model card of a run's adapter."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from custom_components.datasets.source_files import is_on_hub
from custom_components.datasets.tokenized_rows import TokenizedRows
from custom_components.runs.metrics import read_metrics
from custom_components.training.state import Progress
from custom_components.transforms.dialogs import chat_messages
from custom_components.transforms.jinja_dialogs import JinjaTemplate
from custom_components.transforms.prompt_format import PromptFormat
from custom_components.transforms.templates import dialog_turns, prompt_template
from custom_components.transforms.turns import text_of
from custom_components.weights.adapter_settings import AdapterSettings
from custom_components.weights.card import (
    FIRST_SECTION,
    LAST_SECTION,
    TAG,
    TrainedSteps,
    front_matter,
    local_path,
    markdown_link,
    path_name,
    plain_text,
)
from custom_components.weights.checkpoint_files import BaseCheckpoint


@dataclass(frozen=True)
class TrainingFacts:
    """How an adapter was trained, besides its rows and its losses.

    Attributes:
        base: the model that was adapted.
        adapter: its sizes and its variant.
        is_base_quantized: it was trained over NF4 weights.
        train_on: what was supervised, a value of the config's key.
        hyperparameters: by their names in the config; None: without effect, and not named.
        preference_loss: the name of the loss of pairs of answers; None: it was trained on single answers.
    """

    base: BaseCheckpoint
    adapter: AdapterSettings
    is_base_quantized: bool
    prompt_format: PromptFormat
    train_on: str
    hyperparameters: Mapping[str, object]
    preference_loss: str | None = None

    @property
    def method(self) -> str:
        """What the adapter was trained by, in words."""
        if self.preference_loss is None:
            return "supervised fine-tuning"
        return f"{_METHODS.get(self.preference_loss, self.preference_loss)}, from pairs of a better and a worse answer"


# Losses of pairs, by their names in preference_losses.
_METHODS = {
    "sigmoid": "direct preference optimization (DPO)",
    "cdpo": "conservative direct preference optimization (cDPO)",
    "robust": "robust direct preference optimization (rDPO)",
    "ipo": "identity preference optimization (IPO)",
    "simpo": "simple preference optimization (SimPO)",
    "orpo": "odds ratio preference optimization (ORPO)",
}


def adapter_card(
    training: TrainingFacts,
    dataset: TokenizedRows,
    dataset_val: TokenizedRows | None,
    progress: Progress,
    steps: TrainedSteps,
    metrics: Path,
) -> str:
    """Compose the card of a run's adapter, as Markdown with front matter.

    Args:
        dataset, dataset_val: the rows trained on, and validated on.
        metrics: the run's metrics.jsonl.
    """
    base, directory = training.base.hub_name, training.base.directory
    is_of_pairs = training.preference_loss is not None
    head = front_matter(
        training.base,
        relation="adapter",
        library_name="peft",
        tags=["lora", *(["qlora"] if training.is_base_quantized else []), *(["dpo"] if is_of_pairs else []), TAG],
        datasets=[summary.source for summary in dataset.summaries if is_on_hub(summary.source)],
        steps=steps,
    )
    kind = "QLoRA" if training.is_base_quantized else "LoRA"
    return "".join(
        [
            head,
            f"\n# {kind} adapter for {markdown_link(base) or local_path(directory)}\n",
            f"\nTrained with `llama-lora-recipes`, by {training.method}. {_which_step(progress, steps)}\n",
            FIRST_SECTION,
            *(f"- {line}\n" for line in _data_lines(training, dataset, dataset_val)),
            "\n## Prompt format\n",
            _prompt_format(training.prompt_format),
            "\n## Training\n\n",
            *(f"- {name}: {plain_text(value)}\n" for name, value in _hyperparameters(training, progress).items()),
            f"\n## Losses\n\n{'Per pair' if is_of_pairs else 'In nats per supervised token'}.\n\n",
            *(f"- {line}\n" for line in (_pair_lines if is_of_pairs else _loss_lines)(progress, metrics)),
            LAST_SECTION,
            how_to_load_adapter(training.adapter, base or f"path/to/{path_name(directory)}"),
        ]
    )


def _which_step(progress: Progress, steps: TrainedSteps) -> str:
    stopped = ""
    if not steps.is_finished:
        stopped = f"The run was stopped at step {steps.num_steps} of {steps.num_planned_steps}. "
    if progress.best_step is not None:
        best = f"step {progress.best_step} of {progress.num_steps}"
        return f"{stopped}It is the state after {best}, the best by validation loss."
    return f"{stopped}It is the state after the last of {progress.num_steps} steps."


def _data_lines(training: TrainingFacts, dataset: TokenizedRows, dataset_val: TokenizedRows | None) -> Iterator[str]:
    for summary in dataset.summaries:
        name = markdown_link(summary.source, "datasets/") if is_on_hub(summary.source) else local_path(summary.source)
        split = f", split {summary.split}" if summary.split != "train" else ""
        weight = f", weight {summary.weight:g}" if summary.num_taken is not None else ""
        dropped = f" of {summary.num_rows}" if summary.num_kept < summary.num_rows else ""
        truncated = f", {summary.num_truncated} of them cut to the longest length" if summary.num_truncated else ""
        yield f"{name}{split}{weight}: {summary.num_kept}{dropped} rows{truncated}"
    yield f"rows trained on: {len(dataset)}"
    if dataset_val is not None:
        yield f"rows validated on: {len(dataset_val)}"
    if training.preference_loss is not None:
        yield "compared: the answers in which the two dialogs of a row differ"
        return
    yield {
        "assistant": "supervised: the answers",
        "last_assistant": "supervised: the last answer of each dialog",
        "all": "supervised: prompts and answers",
    }[training.train_on]


def _prompt_format(prompt_format: PromptFormat) -> str:
    """Show a dialog of placeholders as it is tokenized, with `<s>` and `</s>` for BOS and EOS."""
    template, system_prompt = prompt_format.prompt_template, prompt_format.system_prompt
    system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
    exchange = [{"role": "user", "content": "{question}"}, {"role": "assistant", "content": "{answer}"}]
    written = prompt_template(template)
    if isinstance(written, JinjaTemplate):
        written = written.with_names("<s>", "</s>", prompt_format.stop_tokens)
    turns = dialog_turns(chat_messages([*system, *exchange, *exchange]), written)
    text = text_of(turns, "<s>", "</s>")
    ends = next((f"`{token}`" for token in prompt_format.stop_tokens if token in text), "`</s>`")
    name = f"`{template}`" if isinstance(template, str) else "One of its own"
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return (
        f"\n{name}. A dialog of two questions; `<s>` and `</s>` are the tokenizer's control tokens, and {ends} ends an "
        f"answer:\n\n{fence}text\n{text}\n{fence}\n"
    )


def _hyperparameters(training: TrainingFacts, progress: Progress) -> Mapping[str, object]:
    """Name those that had an effect, by their names in the config."""
    adapter = training.adapter
    chosen = {
        "adapted modules": adapter.target_modules,
        "lora_rank": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        **adapter.flags,
        "base while training": "4-bit NF4 with double quantization" if training.is_base_quantized else None,
        "optimizer steps": progress.num_steps,
        **training.hyperparameters,
    }
    return {name: value for name, value in chosen.items() if value is not None}


def _loss_lines(progress: Progress, metrics: Path) -> Iterator[str]:
    steps = [record for record in read_metrics(metrics) if record.get("loss") is not None]
    num_tokens = sum(record["supervised_tokens"] for record in steps)
    mean = sum(record["loss"] * record["supervised_tokens"] for record in steps) / num_tokens
    yield f"training, last step: {steps[-1]['loss']:.4f}"
    yield f"training, mean over the tokens of all steps: {mean:.4f}"
    if progress.best_step is not None:
        yield f"validation, best, after step {progress.best_step}: {progress.best_val_loss:.4f}"


def _pair_lines(progress: Progress, metrics: Path) -> Iterator[str]:
    records = read_metrics(metrics)
    steps = [record for record in records if record.get("loss") is not None]
    yield f"training, last step: {steps[-1]['loss']:.4f}"
    yield f"training, pairs right in the last step: {steps[-1]['reward_accuracy']:.1%}"
    validations = {record["step"]: record for record in records if "val_loss" in record}
    if progress.best_step in validations:
        best = validations[progress.best_step]
        yield f"validation, best, after step {progress.best_step}: {best['val_loss']:.4f}"
        yield f"validation, pairs right then: {best['val_reward_accuracy']:.1%}"


# The ranks that `vllm serve --max-lora-rank` takes: vllm-project/vllm, vllm/config/lora.py, MaxLoRARanks.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def how_to_load_adapter(adapter: AdapterSettings, base: str) -> str:
    """Show, as Markdown, how each tool loads the adapter.

    Args:
        base: what transformers and vLLM load: a name on the hub, or a path.
    """
    is_plain = not (
        "use_dora" in adapter.flags
        or "lm_head" in adapter.target_modules
        or adapter.rank_pattern  # vLLM takes one rank and one alpha for all layers: vllm/lora/peft_helper.py
        or adapter.alpha_pattern
        or adapter.token_ids  # nor does it read trained tokens
    )
    resize = ""
    if adapter.num_embeddings is not None:
        resize = f"model.resize_token_embeddings({adapter.num_embeddings})  # for the new tokens\n"
    vllm_rank = next((rank for rank in _VLLM_RANKS if rank >= adapter.rank), None)
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
{resize}model.load_adapter("path/to/adapter")
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

model = AutoModelForCausalLM.from_pretrained("{base}")
{resize}model = PeftModel.from_pretrained(model, "path/to/adapter")
```
{fourth}"""
