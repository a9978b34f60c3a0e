"""Writing an adapter alone as a GGUF file, which llama.cpp puts on a base (`--lora`).

Format: ggml-org/llama.cpp, convert_lora_to_gguf.py, and what reads it, src/llama-adapter.cpp: the update of a weight is
scaled by the file's alpha over the rank of B.
"""

from pathlib import Path

import numpy as np
from torch import Tensor
from torchtune.models.convert_weights import get_mapped_key

from custom_components.export.gguf import import_gguf
from custom_components.export.merged_weights import MergedAdapter
from custom_components.models.lora import LoRALinear
from custom_components.models.shapes import LlamaShape
from custom_components.runtime.atomic_files import whole_file
from custom_components.runtime.errors import UserError
from custom_components.weights.names import HUGGING_FACE_NAMES


def write_gguf_lora(path: Path, adapter: MergedAdapter, shape: LlamaShape, name: str) -> None:
    """Write an adapter in fp32, whole or not at all.

    A and B are in torchtune's row order, which is also that of GGUF's `llama` architecture.

    Args:
        shape: of the base.
        name: the adapter's name, for people.

    Raises:
        UserError: the package gguf is not installed, or llama.cpp cannot compute this adapter.
    """
    gguf = import_gguf()
    if not all(set(module.adapter_params()) == set(LoRALinear.peft_names) for module in adapter.modules.values()):
        raise UserError("format: llama.cpp has no DoRA adapters; write the merged model, with format=gguf")
    if adapter.token_rows:
        raise UserError("format: llama.cpp has no tokens in adapters; write the merged model, with format=gguf")
    if shape.tied_embeddings and "output" in adapter.modules:
        raise UserError(
            "format: the adapter changes an output head that is the base's embedding, which llama.cpp cannot do beside "
            "the base; write the merged model, with format=gguf"
        )
    first = next(iter(adapter.modules.values()))
    alpha = first.scaling * first.rank
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    gguf_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.num_layers)
    for module_name, module in adapter.modules.items():
        stored = get_mapped_key(f"{module_name}.weight", HUGGING_FACE_NAMES)
        gguf_name = gguf_names.get_name(stored, try_suffixes=(".weight",))
        # The file has one alpha: what a layer's scaling is beside it goes into B.
        factor = module.scaling * module.rank / alpha
        writer.add_tensor(f"{gguf_name}.lora_a", _values(module.lora_a.weight))
        writer.add_tensor(f"{gguf_name}.lora_b", _values(module.lora_b.weight * factor))
    with whole_file(path) as aside:
        writer.write_header_to_file(aside)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _values(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().contiguous().numpy()
