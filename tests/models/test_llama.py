"""The builders: their arguments, the maker of linear layers, and a variant of LoRA that only this file has."""

import inspect
import json

import pytest
import torch
import torchtune.models.llama2
from safetensors.torch import load_file
from torch import nn
from torchtune.modules import TiedLinear
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from custom_components import models
from custom_components.generation.incremental import KeyValueCache, fold_adapters, made_for_inference
from custom_components.models import DoRALinear, LoRALinear
from custom_components.models.llama import LinearPlace, frozen_linear, llama, lora_llama
from custom_components.models.lora import FrozenLinear, adapter_modules, merged_weight
from custom_components.models.shapes import LlamaShape, shape_from_checkpoint
from custom_components.weights.checkpoint_files import open_checkpoint
from custom_components.weights.checkpoint_loading import load_base_weights
from tests.support.adapters import saved_adapter
from tests.support.models import CPU, TOKENS, with_random_adapters

SHAPE = LlamaShape(96, 2, 4, 2, 64, 128, 32)
BUILDERS = [name for name in models.__all__ if name.startswith("lora_")]


def positional(builder):
    kinds = inspect.signature(builder).parameters.values()
    return [(parameter.name, parameter.default) for parameter in kinds if parameter.kind != parameter.KEYWORD_ONLY]


@pytest.mark.parametrize("name", BUILDERS)
def test_positional_arguments_are_those_of_torchtune_in_its_order(name):
    expected = positional(torchtune.models.llama2.lora_llama2_7b)
    ours = positional(getattr(models, name))
    assert ours[-len(expected) :] == expected
    assert [argument for argument, _ in ours[: -len(expected)]] in ([], ["shape"], ["checkpoint_dir"])


def test_torchtune_s_seventh_argument_is_dora_and_its_eighth_quantizes():
    dora = lora_llama(SHAPE, ["q_proj"], False, False, 4, 8, 0.0, True).layers[1].attn.q_proj
    assert isinstance(dora, DoRALinear) and not dora.quantize_base
    quantized = lora_llama(SHAPE, ["q_proj"], False, False, 4, 8, 0.0, False, True).layers[1].attn.q_proj
    assert not isinstance(quantized, DoRALinear) and quantized.quantize_base


def test_the_maker_of_layers_makes_every_linear_layer_knowing_its_place():
    places = []

    def linear(place):
        places.append(place)
        return nn.Linear(place.in_dim, place.out_dim, bias=False)

    model = llama(SHAPE, linear)
    assert all(module.weight.requires_grad for module in model.modules() if isinstance(module, nn.Linear))
    linears = {name for name, module in lora_llama(SHAPE, []).named_modules() if isinstance(module, FrozenLinear)}
    assert {place.name for place in places} == linears and len(places) == len(linears)
    roles = {"q_proj": "attention", "output_proj": "attention", "w2": "feed_forward", "output": "output"}
    for place in places:
        assert model.get_submodule(place.name).weight.shape == (place.out_dim, place.in_dim)
        short_name = place.name.rpartition(".")[2]
        assert place.role == roles.get(short_name, place.role)
    assert lora_llama(SHAPE, []).state_dict().keys() == model.state_dict().keys()


def test_a_maker_may_adapt_some_layers_only():
    def linear(place):
        if place.name.startswith("layers.1."):
            return LoRALinear(place.in_dim, place.out_dim, 4, 8)
        return frozen_linear(place, "nf4")

    model = llama(SHAPE, linear)
    assert {name.split(".")[1] for name in adapter_modules(model)} == {"1"} and len(adapter_modules(model)) == 7
    assert model.layers[0].mlp.w2.quantize_base and not model.output.quantize_base


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_head_of_a_tied_model_has_the_embedding_s_weight(use_dora):
    tied = LlamaShape(96, 2, 4, 2, 64, 128, 32, tied_embeddings=True)
    assert isinstance(lora_llama(tied, []).output, TiedLinear)
    model = lora_llama(tied, [], apply_lora_to_output=True, use_dora=use_dora)
    assert model.output.weight is model.tok_embeddings.weight
    if use_dora:
        torch.testing.assert_close(model.output.magnitude, model.tok_embeddings.weight.norm(dim=1))


class GainLoRALinear(LoRALinear):
    """LoRA whose outputs are multiplied by a learned gain."""

    peft_names = {**LoRALinear.peft_names, "gain": "lora_gain_vector"}

    def __init__(self, *sizes, **settings):
        super().__init__(*sizes, **settings)
        self.gain = nn.Parameter(torch.ones(self.out_dim))

    @property
    def peft_flags(self):
        return {**super().peft_flags, "use_gain": True}

    def allocate_adapter(self, device):
        super().allocate_adapter(device)
        self.gain = nn.Parameter(torch.empty(self.out_dim, device=device))

    def initialize_adapter(self, device):
        super().initialize_adapter(device)
        nn.init.uniform_(self.gain, 0.5, 2.0)

    def adapted_output(self, input, low_rank):
        return super().adapted_output(input, low_rank) * self.gain

    def output_ratio_O(self, dtype):
        return self.gain.detach()

    def add_change(self, merged_OI, base_OI, factor):
        changed_OI = torch.addmm(base_OI, self.lora_b.weight, self.lora_a.weight, alpha=self.scaling)
        merged_OI.add_(changed_OI * self.gain.unsqueeze(1) - base_OI, alpha=factor)


@pytest.fixture
def model_of_new_variant(make_checkpoint):
    checkpoint = make_checkpoint()

    def linear(place: LinearPlace) -> nn.Module:
        if place.role == "output":
            return frozen_linear(place, None)
        return GainLoRALinear(place.in_dim, place.out_dim, 4, 8)

    with torch.device("meta"):
        model = llama(shape_from_checkpoint(checkpoint), linear)
    set_trainable_params(model, get_adapter_params(model))
    load_base_weights(model, open_checkpoint(checkpoint), torch.float32, CPU)
    return with_random_adapters(model).eval()


@torch.no_grad()
def test_a_variant_is_one_class_whose_life_is_known_nowhere_else(model_of_new_variant, tmp_path):
    """A variant that the package has never heard of is loaded, merged, folded, decoded with and saved."""
    model = model_of_new_variant
    expected = model(TOKENS)
    layer = model.layers[0].mlp.w2
    input = torch.randn(3, layer.in_dim)
    torch.testing.assert_close(input @ merged_weight(layer.weight, [(1.0, layer)]).T, layer(input), atol=1e-5, rtol=0)

    adapter = saved_adapter(model, tmp_path / "adapter")
    assert json.loads((adapter / "adapter_config.json").read_text())["use_gain"] is True
    stored = load_file(adapter / "adapter_model.safetensors")
    assert torch.equal(stored["base_model.model.model.layers.0.mlp.down_proj.lora_gain_vector"], layer.gain)
    assert len(stored) == 3 * len(adapter_modules(model))

    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    joined = made_for_inference(model_of_new_variant)
    torch.testing.assert_close(joined(TOKENS, KeyValueCache(), positions), expected[:, -1], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_new_variant_can_be_folded_into_the_weights(model_of_new_variant):
    expected = model_of_new_variant(TOKENS)
    fold_adapters(model_of_new_variant)
    assert not adapter_modules(model_of_new_variant)
    torch.testing.assert_close(model_of_new_variant(TOKENS), expected, atol=1e-4, rtol=0)
