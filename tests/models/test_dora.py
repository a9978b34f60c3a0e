"""DoRA's norms and magnitudes, whichever way the weights come: `load_state_dict`, torchtune's protocol, FSDP."""

import copy

import pytest
import torch
import torch.distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtune.modules.peft import disable_adapter, get_adapter_params
from torchtune.training import load_from_full_model_state_dict

from custom_components.models import DoRALinear, nf4
from custom_components.models.llama import lora_llama
from custom_components.models.lora import adapter_modules
from custom_components.models.shapes import LlamaShape
from tests.support.models import merged_dora_weight, merged_lora_weight, with_random_variants

SHAPE = LlamaShape(96, 2, 4, 2, 64, 128, 32)
TOKENS = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(0))


def dora_llama(quantize_base=False):
    return lora_llama(SHAPE, ["q_proj"], True, True, 4, 8, use_dora=True, quantize_base=quantize_base).eval()


def trained_llama():
    torch.manual_seed(3)
    return with_random_variants(dora_llama())


def split_state(model):
    adapter_names = get_adapter_params(model)
    state = model.state_dict()
    adapter = {name: tensor for name, tensor in state.items() if name in adapter_names}
    return adapter, {name: tensor for name, tensor in state.items() if name not in adapter_names}


@torch.no_grad()
@pytest.mark.parametrize("order", ["together", "adapter first", "base first"])
@pytest.mark.parametrize("is_assigned", [False, True])
def test_a_loaded_state_dict_gives_the_model_that_saved_it(order, is_assigned):
    """torchtune's recipes load base and adapter in either order; "All keys matched" has to mean the same model."""
    model = trained_llama()
    expected = model(TOKENS)
    adapter, base = split_state(model)
    parts = {"together": [adapter | base], "adapter first": [adapter, base], "base first": [base, adapter]}[order]
    loaded = dora_llama()
    for part in parts:
        assert not loaded.load_state_dict(copy.deepcopy(part), strict=False, assign=is_assigned).unexpected_keys
    torch.testing.assert_close(loaded(TOKENS), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_model_on_the_meta_device_can_be_loaded_by_assigning():
    model = trained_llama()
    with torch.device("meta"):
        loaded = dora_llama()
    loaded.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(loaded(TOKENS), model(TOKENS), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("quantize_base", [False, True])
def test_an_untrained_adapter_begins_as_whatever_base_is_loaded(quantize_base):
    torch.manual_seed(4)
    model = dora_llama(quantize_base)
    _, base = split_state(trained_llama())
    model.load_state_dict(base, strict=False)
    output = model(TOKENS)
    with disable_adapter(model):
        torch.testing.assert_close(output, model(TOKENS), atol=1e-6, rtol=0)
    for layer in adapter_modules(model).values():
        weight = nf4.dequantize(layer.weight, torch.float32) if nf4.is_quantized(layer.weight) else layer.weight
        torch.testing.assert_close(layer.magnitude, weight.norm(dim=1))


@torch.no_grad()
def test_a_copy_of_a_layer_follows_its_own_weight():
    layer = DoRALinear(64, 96, 4, alpha=8)
    copied = copy.deepcopy(layer)
    copied.load_state_dict({"weight": torch.randn(96, 64)}, strict=False)
    torch.testing.assert_close(copied.magnitude, copied.weight.norm(dim=1))
    torch.testing.assert_close(layer.magnitude, layer.weight.norm(dim=1))


@torch.no_grad()
def test_the_initial_magnitude_with_a_trained_update_is_the_whole_weight_s():
    """torchtune's protocol: the output is then plain LoRA's."""
    layer = DoRALinear(64, 96, 4, alpha=8)
    magnitude = layer.magnitude
    nn.init.normal_(layer.lora_b.weight)
    assert not torch.allclose(layer.magnitude, merged_lora_weight(layer).norm(dim=1))
    layer.initialize_dora_magnitude()
    torch.testing.assert_close(layer.magnitude, merged_lora_weight(layer).norm(dim=1))
    torch.testing.assert_close(merged_dora_weight(layer), merged_lora_weight(layer))
    assert layer.magnitude is magnitude  # an optimizer may have it already


def test_on_the_meta_device_the_magnitude_cannot_be_initialized():
    with torch.device("meta"):
        layer = DoRALinear(64, 96, 4, alpha=8)
    with pytest.raises(RuntimeError, match="Cannot initialize DoRA magnitude"):
        layer.initialize_dora_magnitude()


@pytest.fixture
def mesh(tmp_path):
    """The devices of one process, with which FSDP shards as with many."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def sharded(model, mesh):
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@torch.no_grad()
def test_sharded_weights_are_followed_too(mesh):
    """FSDP's are new objects; torchtune's distributed recipes load them so, on a model built on the meta device."""
    model = trained_llama()
    state, expected = model.state_dict(), model(TOKENS)
    loaded = dora_llama()
    loaded.load_state_dict(state)
    torch.testing.assert_close(sharded(loaded, mesh)(TOKENS), expected, atol=1e-5, rtol=0)
    with torch.device("meta"):
        built = sharded(dora_llama(), mesh)
    load_from_full_model_state_dict(built, state, torch.device("cpu"), strict=True)
    torch.testing.assert_close(built(TOKENS), expected, atol=1e-5, rtol=0)
    layer, whole = built.layers[1].mlp.w2, model.layers[1].mlp.w2
    built.reshard()
    layer.initialize_dora_magnitude()
    torch.testing.assert_close(layer.magnitude.full_tensor(), merged_lora_weight(whole).norm(dim=1))
