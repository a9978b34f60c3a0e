"""The values of NF4 weights in 16 bits: the nearest that there are, which torchao's are not."""

import pytest
import torch

from custom_components.models import nf4
from custom_components.models.nf4_product import frozen_product


@pytest.mark.parametrize("dequantize", [nf4.dequantize, nf4.dequantize_with_table])
def test_each_value_is_rounded_once_to_the_nearest_of_its_dtype(dequantize):
    weight = nf4.quantize(torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).bfloat16())
    codes = torch.stack([weight.quantized_data >> 4, weight.quantized_data & 15], dim=1).int().flatten()
    levels, scalers = nf4.codebook(weight.device).double(), nf4.block_scalers(weight).double()
    exact = (levels[codes].view(-1, nf4.BLOCK_SIZE) * scalers.unsqueeze(1)).view(weight.shape)
    ours, torchaos = dequantize(weight, torch.bfloat16), weight.get_original_weight()
    assert torch.equal(ours, dequantize(weight, torch.float32).bfloat16())
    # bitsandbytes' levels differ from torchao's in the fifth place, which bf16 has not: it hardly counts here.
    assert (ours.double() - exact).norm() < 0.7 * (torchaos.double() - exact).norm()


def test_products_are_closer_to_fp64_than_with_torchao_s_weight():
    generator = torch.Generator().manual_seed(0)
    weight = nf4.quantize(torch.randn(512, 512, generator=generator).bfloat16())
    input = torch.randn(64, 512, generator=generator).bfloat16()
    exact = input.double() @ nf4.dequantize(weight, torch.float32).double().T
    ours, torchtunes = frozen_product(input, weight), input @ weight.get_original_weight().T
    assert ours.dtype == torchtunes.dtype == torch.bfloat16
    assert (ours.double() - exact).norm() < (torchtunes.double() - exact).norm()
