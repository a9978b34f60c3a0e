"""How to load an adapter, and a merged model, in four tools: a model card's section."""

from pathlib import Path

from custom_components.settings import TrainingSettings

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


HOW_TO_LOAD_MERGED = """
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
