"""The formats of a quantized base: as close to the weight as the libraries' own, and one from loading to merging."""

import pytest
import torch
from torch.nn.functional import linear

from custom_components.models import nf4_product, quantization
from custom_components.models.llama import lora_llama
from custom_components.models.quantization import chosen_quantization
from custom_components.models.shapes import LLAMA2_7B
from custom_components.weights.checkpoint_files import open_checkpoint
from custom_components.weights.checkpoint_loading import base_format, frozen_checksum, load_base_weights
from tests.support.models import CPU, TOKENS, loaded_model, with_random_variants

OTHERS = ["nf4_single", "int8"]


def random_weight(out_dim=512, in_dim=1024):
    return torch.randn(out_dim, in_dim, generator=torch.Generator().manual_seed(0)) * 0.02


def error(weight, format):
    quantized = quantization.quantize(weight, format)
    return (quantization.dequantize(quantized, torch.float32) - weight).norm().item()


def test_L15_nf4_without_double_quantization_is_as_close_as_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = random_weight()
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
    theirs = (functional.dequantize_4bit(codes, state) - weight).norm().item()
    assert error(weight, "nf4_single") == pytest.approx(theirs, rel=0.01)
    assert error(weight, "nf4_single") < error(weight, "nf4")


def test_L15_int8_is_as_close_as_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = random_weight()
    codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())
    theirs = (functional.int8_vectorwise_dequant(codes, absmax).float() - weight).norm().item()
    assert error(weight, "int8") == pytest.approx(theirs, rel=0.01)
    assert error(weight, "int8") < error(weight, "nf4") / 8


@pytest.mark.parametrize(("format", "num_bits"), [("nf4", 4.13), ("nf4_single", 4.51), ("int8", 8.04)])
def test_a_format_is_as_small_as_it_says_and_empty_has_its_tensors(format, num_bits):
    weight = random_weight()
    stored = quantization.stored_tensors(quantization.quantize(weight, format, torch.bfloat16))
    assert 8 * sum(tensor.nbytes for tensor in stored) / weight.numel() <= num_bits
    empty = quantization.empty(weight.shape, format, torch.bfloat16, torch.device("meta"))
    alike = [(tensor.shape, tensor.dtype) for tensor in quantization.stored_tensors(empty)]
    assert alike == [(tensor.shape, tensor.dtype) for tensor in stored]
    assert len(stored) == quantization.num_stored_tensors(format)


@pytest.mark.parametrize("format", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_and_its_gradient_are_those_of_the_dequantized_weight(format, dtype):
    weight = quantization.quantize(random_weight(64, 192), format, dtype)
    dense = quantization.dequantize(weight, dtype)
    input = torch.randn(5, 192, dtype=dtype, requires_grad=True)
    output = nf4_product.frozen_product(input, weight)
    torch.testing.assert_close(output, linear(input, dense))
    [gradient] = torch.autograd.grad(output.sum(), input)
    torch.testing.assert_close(gradient, torch.ones_like(output) @ dense)


@pytest.mark.parametrize(
    ("quantize_base", "named", "chosen"),
    [
        *((False, None, None), (True, None, "nf4"), (True, "nf4", "nf4"), (False, "nf4_single", "nf4_single")),
        *((False, "int8", "int8"), (False, "none", None)),
    ],
)
def test_the_format_that_two_settings_choose(quantize_base, named, chosen):
    assert chosen_quantization(quantize_base, named) == chosen


@pytest.mark.parametrize("named", ["int8", "nf4_single", "none"])
def test_settings_at_odds_are_refused(named):
    with pytest.raises(ValueError, match=f"quantization: '{named}' beside quantize_base true"):
        lora_llama(LLAMA2_7B, ["q_proj"], quantize_base=True, quantization=named)
    with pytest.raises(ValueError, match="quantization: 'fp4' is none of nf4, nf4_single, int8 and none"):
        chosen_quantization(False, "fp4")


@pytest.mark.parametrize("format", OTHERS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_model_computes_what_its_dequantized_weights_do_and_keeps_them(make_checkpoint, format, use_dora):
    """L12: the bytes of the base are the same after a backward."""
    model = with_random_variants(loaded_model(make_checkpoint(), quantization=format, use_dora=use_dora))
    assert base_format(model) == quantization.WORDS[format]
    before = frozen_checksum(model)
    output = model(TOKENS)
    output.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert frozen_checksum(model) == before
    for module in model.modules():
        if getattr(module, "quantization", None) is not None:
            dense = quantization.dequantize(module.weight, torch.float32)
            module.weight = torch.nn.Parameter(dense, requires_grad=False)
    torch.testing.assert_close(model(TOKENS), output, atol=1e-4, rtol=0)


@pytest.mark.parametrize("format", OTHERS)
def test_the_cache_of_a_format_is_its_own(make_checkpoint, tmp_path, format):
    checkpoint = make_checkpoint()
    sums = {}
    for name in ("nf4", format, format):
        model = loaded_model_of(checkpoint, name, tmp_path)
        assert frozen_checksum(model) == sums.setdefault(name, frozen_checksum(loaded_model_of(checkpoint, name, None)))
    assert len(list((tmp_path / "quantized").iterdir())) == 2 and len(set(sums.values())) == 2


def loaded_model_of(checkpoint, format, cache_dir):
    base = open_checkpoint(checkpoint)
    with torch.device("meta"):
        model = lora_llama(base.shape, ["q_proj"], quantization=format)
    load_base_weights(model, base, torch.bfloat16, CPU, cache_dir)
    return model
