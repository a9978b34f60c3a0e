"""The weights of a GGUF file, read back one at a time under torchtune's names."""

from pathlib import Path

import torch
from torch import Tensor
from torchtune.models.convert_weights import get_mapped_key
from torchtune.modules import TransformerDecoder

from custom_components.models.llama import lora_llama
from custom_components.models.shapes import LlamaShape
from custom_components.weights.names import HUGGING_FACE_NAMES


class GgufWeights:
    """What `write_gguf` wrote.

    Attributes:
        model: the model of the given shape, on the meta device.
    """

    def __init__(self, path: Path, shape: LlamaShape) -> None:
        import gguf

        with torch.device("meta"):
            self.model: TransformerDecoder = lora_llama(shape, lora_attn_modules=[])
        self._dequantize = gguf.quants.dequantize
        self._names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.num_layers)
        self._tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def read(self, name: str) -> Tensor:
        """A tensor as the file holds it, in fp32."""
        gguf_name = self._names.get_name(get_mapped_key(name, HUGGING_FACE_NAMES), try_suffixes=(".weight",))
        assert gguf_name is not None, name
        stored = self._tensors[gguf_name]
        return torch.from_numpy(self._dequantize(stored.data, stored.tensor_type).copy())
