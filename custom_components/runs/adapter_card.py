"""The model card of a run's adapter."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from custom_components.datasets.source_files import is_on_hub
from custom_components.datasets.tokenized_rows import TokenizedRows
from custom_components.runs.card_sections import (
    data_lines,
    loss_lines,
    pair_lines,
    prompt_format_section,
    which_step,
)
from custom_components.training.state import Progress
from custom_components.transforms.prompt_format import PromptFormat
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
        base_format: what the base was quantized to, in words; None: it was not.
        train_on: what was supervised, a value of the config's key.
        hyperparameters: by their names in the config; None: without effect, and not named.
        preference_loss: the name of the loss of pairs of answers; None: it was trained on single answers.
    """

    base: BaseCheckpoint
    adapter: AdapterSettings
    base_format: str | None
    prompt_format: PromptFormat
    train_on: str
    hyperparameters: Mapping[str, object]
    preference_loss: str | None = None

    @property
    def is_qlora(self) -> bool:
        """Whether it was trained over NF4 weights."""
        return self.base_format is not None and "NF4" in self.base_format

    @property
    def method(self) -> str:
        """What the adapter was trained by, in words."""
        if self.preference_loss is None:
            return "supervised fine-tuning"
        return f"{_METHODS.get(self.preference_loss, self.preference_loss)}, from pairs of a better and a worse answer"


# Losses of pairs, by their names in preference_losses.
_METHODS = {
    "sigmoid": "direct preference optimization (DPO)",
    "rpo": "direct preference optimization with the chosen answers' loss (RPO)",
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
        tags=["lora", *(["qlora"] if training.is_qlora else []), *(["dpo"] if is_of_pairs else []), TAG],
        datasets=[summary.source for summary in dataset.summaries if is_on_hub(summary.source)],
        steps=steps,
    )
    kind = "QLoRA" if training.is_qlora else "LoRA"
    return "".join(
        [
            head,
            f"\n# {kind} adapter for {markdown_link(base) or local_path(directory)}\n",
            f"\nTrained with `llama-lora-recipes`, by {training.method}. {which_step(progress, steps)}\n",
            FIRST_SECTION,
            *(f"- {line}\n" for line in data_lines(None if is_of_pairs else training.train_on, dataset, dataset_val)),
            "\n## Prompt format\n",
            prompt_format_section(training.prompt_format),
            "\n## Training\n\n",
            *(f"- {name}: {plain_text(value)}\n" for name, value in _hyperparameters(training, progress).items()),
            f"\n## Losses\n\n{'Per pair' if is_of_pairs else 'In nats per supervised token'}.\n\n",
            *(f"- {line}\n" for line in (pair_lines if is_of_pairs else loss_lines)(progress, metrics)),
            LAST_SECTION,
            how_to_load_adapter(training.adapter, base or f"path/to/{path_name(directory)}"),
        ]
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
        "base while training": training.base_format,
        "optimizer steps": progress.num_steps,
        **training.hyperparameters,
    }
    return {name: value for name, value in chosen.items() if value is not None}


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
