"""The model card of a model that a run has trained as a whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from custom_components.datasets.source_files import is_on_hub
from custom_components.datasets.training_data import Data
from custom_components.runs.card_sections import data_lines, loss_lines, prompt_format_section, which_step
from custom_components.training.state import Progress
from custom_components.transforms.prompt_format import PromptFormat
from custom_components.weights.card import (
    FIRST_SECTION,
    LAST_SECTION,
    TAG,
    TrainedSteps,
    front_matter,
    local_path,
    markdown_link,
    plain_text,
)
from custom_components.weights.checkpoint_files import BaseCheckpoint

_HOW_TO_LOAD = """
transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/model", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/model")
```

vLLM:

```
vllm serve path/to/model
```

llama-lora-recipes, which reads the prompt format from the model:

```
tune run recipes/generate.py --config configs/generate.yaml checkpoint_dir=path/to/model prompt="..."
```
"""


@dataclass(frozen=True)
class ModelFacts:
    """How a model was trained, besides its rows and its losses.

    Attributes:
        base: the checkpoint that it began as.
        train_on: what was supervised, a value of the config's key.
        hyperparameters: by their names in the config; None: without effect, and not named.
    """

    base: BaseCheckpoint
    prompt_format: PromptFormat
    train_on: str
    hyperparameters: Mapping[str, object]


def model_card(training: ModelFacts, data: Data, progress: Progress, steps: TrainedSteps, metrics: Path) -> str:
    """Compose the card of a run's model, as Markdown with front matter.

    Args:
        metrics: the run's metrics.jsonl.
    """
    base = training.base
    chosen = {"optimizer steps": progress.num_steps, **training.hyperparameters}
    head = front_matter(
        base,
        relation="finetune",
        library_name="transformers",
        tags=[TAG],
        datasets=[summary.source for summary in data.train.summaries if is_on_hub(summary.source)],
        steps=steps,
    )
    return "".join(
        [
            head,
            f"\n# {markdown_link(base.hub_name) or local_path(base.directory)}, trained further\n",
            f"\nTrained with `llama-lora-recipes`. {which_step(progress, steps)}\n",
            FIRST_SECTION,
            *(f"- {line}\n" for line in data_lines(training.train_on, data.train, data.validation)),
            "\n## Prompt format\n",
            prompt_format_section(training.prompt_format),
            "\n## Training\n\n",
            *(f"- {name}: {plain_text(value)}\n" for name, value in chosen.items() if value is not None),
            "\n## Losses\n\nIn nats per supervised token.\n\n",
            *(f"- {line}\n" for line in loss_lines(progress, metrics)),
            LAST_SECTION,
            _HOW_TO_LOAD,
        ]
    )
