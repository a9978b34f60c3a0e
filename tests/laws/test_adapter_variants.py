"""rsLoRA, LoRA+, DoRA and NEFTune: each is what its paper says, and what PEFT makes of the saved adapter."""

import json
import math

import pytest
import torch
from torch import nn
from torchtune.modules.peft import disable_adapter

from custom_components.models.attention import RowLengths
from custom_components.models.builders import lora_llama_from_config
from custom_components.models.dora import DoRALinear
from custom_components.models.hidden_states import final_hidden_states
from custom_components.models.lora import LoRALinear, adapter_modules
from custom_components.runtime.errors import UserError
from custom_components.training.optimizer import adapter_parameter_groups
from custom_components.weights.adapted_model import lora_settings
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.adapters import check_adapter_was_trained, load_adapter
from tests.support.adapters import saved_adapter
from tests.support.models import (
    TOKENS,
    dequantized_in_hugging_face_order,
    inference_model,
    loaded_model,
    merged_dora_weight,
    with_random_adapters,
    with_random_variants,
)


@pytest.mark.parametrize("rank", [1, 4, 64])
def test_the_scale_is_alpha_over_rank_or_with_rslora_over_its_root(rank):
    assert LoRALinear(64, 64, rank, alpha=16).scaling == 16 / rank
    assert LoRALinear(64, 64, rank, alpha=16, use_rslora=True).scaling == 16 / math.sqrt(rank)


@pytest.mark.parametrize("quantize_base", [False, True])
@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True},
        {"use_dora": True, "apply_lora_to_output": True},
    ],
)
def test_peft_gives_the_same_logits(make_checkpoint, tmp_path, peft, lora, quantize_base):
    """For QLoRA, on transformers' model with the dequantized weights."""
    transformers = pytest.importorskip("transformers")
    checkpoint = make_checkpoint()
    model = loaded_model(checkpoint, quantize_base=quantize_base, lora_alpha=7.0, **lora)
    adapter = saved_adapter(with_random_variants(model).eval(), tmp_path / "adapter")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if quantize_base:
        for name, parameter in theirs.named_parameters():
            if "_proj" in name:
                parameter.data = dequantized_in_hugging_face_order(model, name)
    theirs = peft.PeftModel.from_pretrained(theirs, adapter)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("quantize_base", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_variant_is_the_one_in_memory(make_checkpoint, tmp_path, tied, quantize_base):
    checkpoint = make_checkpoint(tie_word_embeddings=tied)
    variants = {"use_dora": True, "use_rslora": True, "apply_lora_to_output": True, "quantize_base": quantize_base}
    model = with_random_variants(loaded_model(checkpoint, **variants)).eval()
    adapter = saved_adapter(model, tmp_path / "adapter")
    reloaded = inference_model(checkpoint, adapter, quantize_base)
    parameters = dict(reloaded.named_parameters())
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or torch.equal(parameter, parameters[name]), name
    assert torch.equal(model(TOKENS), reloaded(TOKENS))


def test_the_config_names_a_variant_only_where_it_is_one(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint()
    for use_rslora, use_dora in ((False, False), (True, False), (False, True)):
        model = with_random_adapters(loaded_model(checkpoint, use_rslora=use_rslora, use_dora=use_dora))
        adapter = saved_adapter(model, tmp_path / "adapter")
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert [config.get("use_rslora"), config.get("use_dora")] == [use_rslora or None, use_dora or None]
        settings = lora_settings(open_adapter(adapter))
        assert [settings["use_rslora"], settings["use_dora"]] == [use_rslora, use_dora]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_alpha": 32}, "lora_alpha is 16, the model's 32"),
        ({"use_rslora": True}, "use_rslora is False, the model's True"),
        ({"use_dora": True}, "use_dora is False, the model's True"),
    ],
)
def test_an_adapter_with_another_scaling_does_not_fit(make_checkpoint, tmp_path, changes, words):
    checkpoint = make_checkpoint()
    adapter = saved_adapter(with_random_adapters(loaded_model(checkpoint)), tmp_path / "adapter")
    with pytest.raises(UserError, match=words):
        load_adapter(loaded_model(checkpoint, **changes), open_adapter(adapter))


@pytest.mark.parametrize("apply_lora_to_output", [False, True])
def test_with_lora_plus_every_b_has_its_own_rate(make_checkpoint, apply_lora_to_output):
    model = loaded_model(make_checkpoint(), use_dora=True, apply_lora_to_output=apply_lora_to_output)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    [group] = adapter_parameter_groups(model, 1e-3, None)
    assert {names[id(parameter)] for parameter in group["params"]} == trained and group["lr"] == 1e-3
    others, b_weights = torch.optim.AdamW(adapter_parameter_groups(model, 1e-3, 16)).param_groups
    assert {names[id(parameter)] for parameter in b_weights["params"]} == {name for name in trained if "lora_b" in name}
    assert {names[id(parameter)] for parameter in others["params"]} == {
        name for name in trained if "lora_b" not in name
    }
    assert (others["lr"], b_weights["lr"]) == (1e-3, 16 * 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize_base", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_dora_begins_as_the_base(make_checkpoint, tied, quantize_base, dtype):
    checkpoint = make_checkpoint(tie_word_embeddings=tied)
    model = loaded_model(checkpoint, dtype, quantize_base=quantize_base, use_dora=True, apply_lora_to_output=True)
    output = model(TOKENS)
    with disable_adapter(model):
        torch.testing.assert_close(output, model(TOKENS), atol=1e-6 if dtype is torch.float32 else 0.05, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("is_loaded", [False, True])
def test_dora_s_first_magnitudes_are_the_rows_lengths(make_checkpoint, tied, is_loaded):
    """Of a model built with values as well: torchtune's recipes build theirs so."""
    checkpoint = make_checkpoint(tie_word_embeddings=tied)
    build = loaded_model if is_loaded else lora_llama_from_config
    model = build(checkpoint, lora_attn_modules=["q_proj"], apply_lora_to_output=True, use_dora=True)
    for module in adapter_modules(model).values():
        torch.testing.assert_close(module.magnitude, module.weight.norm(dim=1))
        torch.testing.assert_close(module.base_squared_norms, module.weight.square().sum(dim=1))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_dora_is_the_paper_s_formula_and_its_norm_a_constant(use_rslora):
    """Outputs and gradients against equation 5 with the sum built and its norm detached."""
    torch.manual_seed(0)
    layer = DoRALinear(48, 80, 5, alpha=3, use_rslora=use_rslora)
    with torch.no_grad():
        layer.lora_b.weight.normal_()
        layer.magnitude.mul_(1 + torch.rand(80))
    input = torch.randn(2, 7, 48)
    direction = layer.weight + layer.scaling * layer.lora_b.weight @ layer.lora_a.weight
    norms = direction.norm(dim=1).detach()
    expected = input @ (direction.T * layer.magnitude / norms)
    torch.testing.assert_close(layer(input), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(expected, input @ merged_dora_weight(layer).T, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(expected)
    trained = [layer.lora_a.weight, layer.lora_b.weight, layer.magnitude]
    gradients = torch.autograd.grad((layer(input) * weights).sum(), trained)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), trained)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.any() and gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("quantize_base", [False, True])
def test_dora_s_magnitude_learns_from_the_first_step(make_checkpoint, quantize_base):
    model = loaded_model(make_checkpoint(), torch.bfloat16, quantize_base=quantize_base, use_dora=True)
    model(TOKENS).float().logsumexp(-1).sum().backward()
    for name, module in adapter_modules(model).items():
        assert module.magnitude.dtype == module.magnitude.grad.dtype == torch.float32
        assert module.magnitude.grad.isfinite().all() and module.magnitude.grad.any(), name
        assert module.lora_b.weight.grad.any(), name


def test_dora_drops_inputs_of_the_update_only():
    """The norm is of the weights, not of what was dropped: an update of zero gives the base, dropout or not."""
    torch.manual_seed(0)
    layer = DoRALinear(64, 64, 4, alpha=8, dropout=0.5).train()
    input = torch.randn(3, 64)
    torch.testing.assert_close(layer(input), layer.plain_output(input), atol=1e-6, rtol=0)
    with torch.no_grad():
        layer.lora_b.weight.normal_()
    outputs = torch.stack([layer(input) for _ in range(4000)]).mean(0)
    expected = layer.eval()(input)
    assert (outputs - expected).norm() < 0.1 * expected.norm()


def test_dora_leaves_a_row_of_zeros_zero():
    layer = DoRALinear(64, 8, 4, alpha=8)
    with torch.no_grad():
        layer.weight[3] = 0
    layer.initialize_dora_magnitude()
    for b_std in (0.0, 1.0):
        nn.init.normal_(layer.lora_b.weight, std=b_std)
        output = layer(torch.randn(5, 64))
        output.sum().backward()
        assert output.isfinite().all() and not output[:, 3].any()
        assert all(parameter.grad.isfinite().all() for parameter in layer.parameters() if parameter.requires_grad)


def test_a_magnitude_that_is_not_finite_is_an_error(make_checkpoint):
    model = with_random_adapters(loaded_model(make_checkpoint(), use_dora=True))
    check_adapter_was_trained(model)
    model.layers[1].mlp.w2.magnitude.data[0] = float("inf")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.w2 is not finite"):
        check_adapter_was_trained(model)


def embeddings_only(model):
    """What `final_hidden_states` gives is then the embeddings."""
    model.layers, model.norm = nn.ModuleList(), nn.Identity()
    return model


def test_neftune_noise_is_bounded_by_the_length_of_its_row(make_checkpoint):
    model = embeddings_only(loaded_model(make_checkpoint())).train()
    lengths, width, alpha = (3, 40, 200), 64, 5.0
    tokens = torch.randint(512, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))

    def noise(mask):
        noisy = final_hidden_states(model, tokens, mask, torch.zeros_like(tokens), neftune_noise_alpha=alpha)
        return noisy - model.tok_embeddings(tokens)

    drawn = noise(RowLengths(lengths))
    for length, row_noise in zip(lengths, drawn.split(lengths, dim=1), strict=True):
        bound = alpha / math.sqrt(length * width)
        assert 0.95 * bound < row_noise.abs().max() <= bound + 1e-6
        torch.testing.assert_close(row_noise.std().item(), bound / math.sqrt(3), rtol=0.1, atol=0)
    assert 0.95 < noise(None).abs().max() / (alpha / math.sqrt(sum(lengths) * width)) < 1 + 1e-4
    assert not torch.equal(noise(RowLengths(lengths)), drawn)


def test_neftune_noise_is_for_training_only(make_checkpoint):
    model = loaded_model(make_checkpoint()).eval()
    positions = torch.arange(30).expand(2, 30)
    plain = final_hidden_states(model, TOKENS, None, positions)
    assert torch.equal(final_hidden_states(model, TOKENS, None, positions, neftune_noise_alpha=5.0), plain)
    model.train()
    assert torch.equal(final_hidden_states(model, TOKENS, None, positions), plain)
    assert not torch.equal(final_hidden_states(model, TOKENS, None, positions, neftune_noise_alpha=5.0), plain)
