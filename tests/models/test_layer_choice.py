"""Adapters of different ranks and scales, and of some layers only."""

import json

import pytest
import torch

from custom_components.datasets.batching import collate
from custom_components.memory.simulated_step import simulated_step
from custom_components.models.builders import lora_llama_from_config
from custom_components.models.hidden_states import num_layers_with_backward
from custom_components.models.linear_names import hugging_face_module
from custom_components.models.lora import FrozenLinear, adapter_modules
from custom_components.runtime.errors import UserError
from custom_components.training.gradients import ForwardOptions, accumulate_gradients, supervised_loss
from custom_components.training.loss import LinearCrossEntropy
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.adapters import load_adapter
from custom_components.weights.names import HUGGING_FACE_NAMES, translated_name
from tests.support.adapters import saved_adapter
from tests.support.models import CPU, TOKENS, inference_model, loaded_model, with_random_variants
from tests.support.rows import random_rows

PATTERNS = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\..*": 6},
    "alpha_pattern": {"down_proj": 3.5, "model.layers.0.self_attn.k_proj": 5, "output_proj": 9},
}


def test_names_are_those_of_hugging_face(make_checkpoint):
    model = loaded_model(make_checkpoint(), apply_lora_to_output=True)
    for name in adapter_modules(model):
        assert f"{hugging_face_module(name)}.weight" == translated_name(f"{name}.weight", HUGGING_FACE_NAMES)


def test_the_first_pattern_that_matches_gives_rank_and_alpha(make_checkpoint):
    modules = adapter_modules(loaded_model(make_checkpoint(), lora_rank=4, lora_alpha=8, **PATTERNS))
    for name, module in modules.items():
        rank = 2 if name.endswith("q_proj") else 6 if name.startswith("layers.1.") else 4
        alphas = {"layers.0.mlp.w2": 3.5, "layers.1.mlp.w2": 3.5, "layers.0.attn.k_proj": 5}
        alpha = 9 if name.endswith("output_proj") else alphas.get(name, 8)
        assert (module.rank, module.alpha, module.scaling) == (rank, alpha, alpha / rank)
        assert module.lora_a.weight.shape == (rank, module.in_dim)


@pytest.mark.parametrize("lora", [{}, {"use_dora": True, "use_rslora": True}])
@pytest.mark.parametrize("layers", [None, [1]])
def test_peft_loads_what_is_saved(make_checkpoint, tmp_path, peft, lora, layers):
    transformers = pytest.importorskip("transformers")
    checkpoint = make_checkpoint()
    model = loaded_model(
        checkpoint, lora_alpha=7.0, apply_lora_to_output=layers is not None, layers_to_transform=layers, **lora,
        **PATTERNS if layers is None else {"rank_pattern": {"lm_head": 3}},
    )  # fmt: skip
    adapter = saved_adapter(with_random_variants(model).eval(), tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, adapter)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=0)
        assert torch.equal(model(TOKENS), inference_model(checkpoint, adapter)(TOKENS))
    again = loaded_model(checkpoint, lora_alpha=7.0, seed=1, layers_to_transform=layers, **lora,
                         apply_lora_to_output=layers is not None,
                         **PATTERNS if layers is None else {"rank_pattern": {"lm_head": 3}}).eval()  # fmt: skip
    load_adapter(again, open_adapter(adapter))
    assert torch.equal(model(TOKENS), again(TOKENS))


def test_a_plain_adapter_s_config_says_nothing_of_patterns(make_checkpoint, tmp_path):
    adapter = saved_adapter(with_random_variants(loaded_model(make_checkpoint())), tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert not config.keys() & {"rank_pattern", "alpha_pattern", "layers_to_transform"}


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank_pattern": {"k_proj": 5}}, "lora_rank of model.layers.0.self_attn.k_proj is 4, the model's 5"),
        ({"alpha_pattern": {"layers.1.mlp.up_proj": 5}}, "lora_alpha of model.layers.1.mlp.up_proj is 16, the model"),
        ({"layers_to_transform": [1]}, r"model\.layers\.0\.\S+ has no place in the model"),
    ],
)
def test_an_adapter_of_other_sizes_does_not_fit(make_checkpoint, tmp_path, lora, words):
    checkpoint = make_checkpoint()
    adapter = saved_adapter(with_random_variants(loaded_model(checkpoint)), tmp_path / "adapter")
    with pytest.raises(UserError, match=words):
        load_adapter(loaded_model(checkpoint, **lora), open_adapter(adapter))


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank_pattern": {"q_prj": 4}}, "rank_pattern: 'q_prj' is the first match of no adapted layer"),
        ({"alpha_pattern": {"lm_head": 4}}, "alpha_pattern: 'lm_head' is the first match of no adapted layer"),
        ({"rank_pattern": {".*": 4, "q_proj": 2}}, "rank_pattern: 'q_proj' is the first match of no"),
        ({"layers_to_transform": [0, 2]}, r"layers_to_transform: \[2\] are none of the model's layers, 0 to 1"),
    ],
)
def test_L32_what_would_have_no_effect_is_an_error(make_checkpoint, lora, words):
    checkpoint = make_checkpoint()
    with pytest.raises(UserError, match=words), torch.device("meta"):
        lora_llama_from_config(checkpoint, ["q_proj"], **lora)


@pytest.mark.parametrize("num_recomputed_layers", [0, 1, 4])
@pytest.mark.parametrize("quantize_base", [False, True])
def test_layers_below_the_first_adapter_do_no_backward(
    make_checkpoint, monkeypatch, num_recomputed_layers, quantize_base
):
    """Nor are they computed again; those above are, adapted or not."""
    checkpoint = make_checkpoint(num_hidden_layers=4)
    model = loaded_model(checkpoint, quantize_base=quantize_base, layers_to_transform=[2]).train()
    layer_of = {id(module): index for index, layer in enumerate(model.layers) for module in layer.modules()}
    forwards, backwards = [0] * 4, [0] * 4
    plain_output = FrozenLinear.plain_output

    def counted(module, input):
        output = plain_output(module, input)
        index = layer_of.get(id(module))
        if index is not None:
            forwards[index] += 1
            if output.grad_fn is not None:
                output.register_hook(lambda _: backwards.__setitem__(index, backwards[index] + 1))
        return output

    monkeypatch.setattr(FrozenLinear, "plain_output", counted)
    loss_of = supervised_loss(model, LinearCrossEntropy(), ForwardOptions(num_recomputed_layers))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    accumulate_gradients([collate(random_rows(2))], loss_of, scaler, CPU)
    assert forwards[:2] == [7, 7] and backwards[:2] == [0, 0]
    assert all(backwards[2:])
    assert (forwards[2] > 7, forwards[3] > 7) == (num_recomputed_layers > 0, num_recomputed_layers > 1)
    modules = adapter_modules(model)
    assert {name.split(".")[1] for name in modules} == {"2"}
    assert all(module.lora_b.weight.grad.any() for module in modules.values())


def test_the_estimate_counts_layers_as_they_are(make_checkpoint):
    checkpoint = make_checkpoint(num_hidden_layers=6)

    def step(**lora):
        with torch.device("meta"):
            model = lora_llama_from_config(checkpoint, ["q_proj"], True, **lora)
        memory = simulated_step(model, torch.bfloat16, "cpu", (50, 50), LinearCrossEntropy())
        return num_layers_with_backward(model), memory

    num_layers, whole = step()
    num_upper_layers, upper = step(layers_to_transform=[4, 5])
    num_sparse_layers, sparse = step(layers_to_transform=[2, 5])
    assert (num_layers, num_upper_layers, num_sparse_layers) == (6, 2, 4)
    assert upper == whole
    assert sparse.kept_layer_bytes < whole.kept_layer_bytes and sparse.fixed_bytes == whole.fixed_bytes
    _, thicker = step(rank_pattern={r"layers\.5\..*": 32})
    _, thickest = step(lora_rank=32)
    assert whole.kept_layer_bytes < thicker.kept_layer_bytes < thickest.kept_layer_bytes
    assert abs(thicker.kept_layer_bytes - (5 * whole.kept_layer_bytes + thickest.kept_layer_bytes) / 6) <= 1
