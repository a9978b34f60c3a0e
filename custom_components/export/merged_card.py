"""The model card of a merged model: its README.md, for people and for the hub.

Only what is known is said. Local files and directories are named by their last component: a card is made to be
published, and the paths of the machine that trained are private.

Front matter: huggingface.co/docs/hub/model-cards. `base_model` and `datasets` take names on the hub only.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from custom_components.export.modelfile import MODELFILE_NAME
from custom_components.weights.card import (
    CARD_NAME,
    FIRST_SECTION,
    LAST_SECTION,
    TAG,
    card_metadata,
    front_matter,
    local_path,
    markdown_link,
)
from custom_components.weights.checkpoint_files import BaseCheckpoint

_HOW_TO_LOAD_MERGED = """
transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/merged")
tokenizer = AutoTokenizer.from_pretrained("path/to/merged")
```

vLLM:

```
vllm serve path/to/merged
```

llama.cpp:

```
python convert_hf_to_gguf.py path/to/merged --outfile merged.gguf
llama-cli -m merged.gguf
```

llama-lora-recipes:

```
tune run recipes/generate.py --config configs/generate.yaml checkpoint_dir=path/to/merged prompt="..."
```
"""
_HOW_TO_LOAD_GGUF = """
llama.cpp:

```
llama-server -m {file_name}
```
"""
_HOW_TO_LOAD_IN_OLLAMA = """
Ollama, with the prompt format of the `Modelfile` beside it:

```
ollama create NAME -f Modelfile
ollama run NAME
```
"""


def merged_card(
    base: BaseCheckpoint,
    adapters: Sequence[tuple[Path, float]],
    merged_onto: Literal["original", "dequantized"],
    file_names: Collection[str] = (),
) -> str:
    """Compose the card of a base model that adapters were merged into, or of one without them, as Markdown.

    It has front matter.

    What a run's card says of data, prompt format and training is taken over; of an adapter without such a card nothing
    is said.

    Args:
        adapters: directories, each with its weight.
        merged_onto: the base's weights as they are in the checkpoint, or as training held them, quantized.
        file_names: of the files beside the card; with a `.gguf` it says how to load that one.
    """
    gguf_file = next((name for name in file_names if name.endswith(".gguf")), None)
    cards = [_own_card(adapter_dir) for adapter_dir, _ in adapters or [(base.directory, 1.0)]]
    head = front_matter(
        base,
        # The hub's "merge" is for models merged from several bases.
        relation="finetune",
        library_name="gguf" if gguf_file else "transformers",
        tags=[TAG],
        datasets=[name for card, _ in cards for name in (card.get("datasets") or [])],
    )
    name = markdown_link(base.hub_name) or local_path(base.directory)
    how = f"with {'a LoRA adapter' if len(adapters) == 1 else f'{len(adapters)} LoRA adapters'} merged in"
    words = f"Merged with `llama-lora-recipes` into the base's {merged_onto} weights."
    if not adapters:
        how, words = "as GGUF", "Written with `llama-lora-recipes`."
    parts = [head, f"\n# {name} {how}\n", f"\n{words}\n"]
    for (adapter_dir, weight), (_, facts) in zip(adapters or [(base.directory, 1.0)], cards, strict=True):
        if len(adapters) > 1 or weight != 1:
            parts.append(f"\n**Adapter {local_path(adapter_dir)}, weight {weight:g}**\n")
        if facts:
            parts.append(f"{FIRST_SECTION}{facts}\n")
    if gguf_file is None:
        how_to_load = _HOW_TO_LOAD_MERGED
    else:
        how_to_load = _HOW_TO_LOAD_GGUF.format(file_name=gguf_file)
        how_to_load += _HOW_TO_LOAD_IN_OLLAMA if MODELFILE_NAME in file_names else ""
    return "".join([*parts, LAST_SECTION, how_to_load])


def _own_card(adapter_dir: Path) -> tuple[dict[str, Any], str]:
    """Read front matter and sections, from data to losses, of a card that :func:`adapter_card` made; else empty."""
    metadata = card_metadata(adapter_dir / CARD_NAME)
    tags = metadata.get("tags")
    if not isinstance(tags, list) or TAG not in tags:
        return {}, ""
    text = (adapter_dir / CARD_NAME).read_text(encoding="utf-8")
    return metadata, text.partition(FIRST_SECTION)[2].rpartition(LAST_SECTION)[0].rstrip("\n")
