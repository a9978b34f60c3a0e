"""The bytes of a base on each of several devices."""

import torch
from torchtune.modules import TransformerDecoder

from custom_components.memory.estimate import base_bytes
from custom_components.models.llama import lora_llama
from custom_components.models.shapes import LlamaShape


def model() -> TransformerDecoder:
    with torch.device("meta"):
        shape = LlamaShape(1024, 8, 4, 2, 128, 256, 64)
        return lora_llama(shape, ["q_proj"], lora_rank=4, lora_alpha=8, quantize_base=True)


def test_each_device_has_its_share_of_the_layers_two_whole_ones_and_the_rest():
    whole, by_2, by_8 = (base_bytes(model(), torch.bfloat16, num_shards) for num_shards in (1, 2, 8))
    embedding_and_head = 2 * 1024 * 128 * 2
    layers = whole - embedding_and_head - 17 * 128 * 4
    assert layers % 8 == 0
    assert by_2 == whole - layers // 2 + 2 * layers // 8
    assert by_8 == whole - layers * 7 // 8 + 2 * layers // 8
