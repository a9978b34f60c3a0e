"""The shapes of Llama 3, Mistral and others, read from a checkpoint's config and computed as transformers does."""

import json

import pytest
import torch
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE

from custom_components import models
from custom_components.generation.incremental import KeyValueCache, made_for_inference
from custom_components.models import shapes
from custom_components.models.rotary import RotaryPositions
from custom_components.models.shapes import RopeScaling, shape_from_checkpoint
from custom_components.runtime.errors import UserError
from custom_components.weights.hugging_face_writing import config_of_shape
from tests.support.checkpoints import as_meta_checkpoint
from tests.support.models import TOKENS, loaded_model

LLAMA3_ROPE = {
    **{"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}
CHANGES = {
    "llama3 rope, tied": {"rope_theta": 500.0, "rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "as transformers 5 writes it": {"rope_parameters": {"rope_theta": 500.0, **LLAMA3_ROPE}},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64},
    "heads wider than their share": {"head_dim": 32},
    "heads narrower than their share": {"model_type": "mistral", "head_dim": 8, "sliding_window": None},
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_L11_logits_are_those_of_transformers(make_checkpoint, name):
    transformers = pytest.importorskip("transformers")
    directory = make_checkpoint(**CHANGES[name])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ours = loaded_model(directory).eval()
    expected = theirs(TOKENS).logits
    torch.testing.assert_close(ours(TOKENS), expected, atol=1e-4, rtol=0)
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    decoding = made_for_inference(ours)
    cache = KeyValueCache()
    decoding(TOKENS[:, :-1], cache, positions[:, :-1])
    last = decoding(TOKENS[:, -1:], cache, positions[:, -1:])
    torch.testing.assert_close(last, expected[:, -1], atol=1e-4, rtol=0)


def test_llama3s_frequencies_are_torchtunes():
    ours = RotaryPositions(128, 512, 500_000.0, RopeScaling("llama3", 8.0))
    theirs = Llama3ScaledRoPE(128, 512, 500_000)
    torch.testing.assert_close(ours.theta, theirs.theta, atol=0, rtol=1e-6)
    torch.testing.assert_close(ours.cache, theirs.cache, atol=1e-4, rtol=0)


def test_a_window_is_the_context(make_checkpoint):
    changes = {"model_type": "mistral", "max_position_embeddings": 256}
    for window, context in ((64, 64), (None, 256), (1024, 256)):
        shape = shape_from_checkpoint(make_checkpoint(f"window {window}", sliding_window=window, **changes))
        assert shape.max_seq_len == context


@pytest.mark.parametrize(
    ("shape", "params"),
    [
        ("LLAMA3_8B", {"ffn_dim_multiplier": 1.3, "multiple_of": 1024}),
        ("LLAMA3_1_8B", {"ffn_dim_multiplier": 1.3, "multiple_of": 1024, "use_scaled_rope": True}),
        ("LLAMA3_2_1B", {"ffn_dim_multiplier": 1.5, "multiple_of": 256, "use_scaled_rope": True}),
        ("LLAMA3_2_3B", {"ffn_dim_multiplier": 1.0, "multiple_of": 256, "use_scaled_rope": True}),
    ],
)
def test_metas_params_give_the_shape(tmp_path, shape, params):
    """params.json of meta-llama/Meta-Llama-3-8B, Llama-3.1-8B, Llama-3.2-1B and -3B, original/."""
    expected = getattr(shapes, shape)
    sizes = {"dim": expected.embed_dim, "n_layers": expected.num_layers, "n_heads": expected.num_heads}
    more = {"n_kv_heads": 8, "norm_eps": 1e-5, "rope_theta": 500_000.0, "vocab_size": 128_256}
    (tmp_path / "params.json").write_text(json.dumps(sizes | more | params))
    found = shape_from_checkpoint(tmp_path)
    assert {**vars(found), "tied_embeddings": None} == {**vars(expected), "tied_embeddings": None}


@pytest.mark.parametrize("shape", ["LLAMA3_8B", "LLAMA3_1_8B", "LLAMA3_2_1B", "LLAMA3_2_3B", "MISTRAL_7B"])
def test_a_config_made_from_a_shape_states_it(tmp_path, shape):
    config = config_of_shape(getattr(shapes, shape), 1) | {
        "tie_word_embeddings": getattr(shapes, shape).tied_embeddings
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shape_from_checkpoint(tmp_path) == getattr(shapes, shape)


@pytest.mark.parametrize(
    ("builder", "num_parameters"),
    [
        # model.safetensors.index.json of the repositories: total_size / 2; tied embeddings once.
        ("lora_llama3_8b", 8_030_261_248),
        ("lora_llama3_1_8b", 8_030_261_248),
        ("lora_llama3_2_1b", 1_235_814_400),
        ("lora_llama3_2_3b", 3_212_749_824),
        ("lora_mistral_7b", 7_241_732_096),
    ],
)
def test_the_named_builders_have_the_published_sizes(builder, num_parameters):
    with torch.device("meta"):
        model = getattr(models, builder)(lora_attn_modules=[])
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model_type": "qwen2"},
            "model_type = 'qwen2' is not supported: its attention has biases, and that is not built",
        ),
        ({"model_type": "mixtral"}, "its feed-forward is of experts"),
        (
            {"model_type": "unheard"},
            "model_type = 'unheard' is not supported: this package trains the Llama and Mistral",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling = 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling = 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "is without low_freq_factor"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
    ],
)
def test_what_is_not_supported_is_said_with_what_is_missing(make_checkpoint, changes, words):
    with pytest.raises(UserError) as error:
        shape_from_checkpoint(make_checkpoint(**changes))
    assert words in str(error.value) and "config.json" in str(error.value)


@torch.no_grad()
def test_metas_layout_with_scaled_frequencies_is_that_of_hugging_face(make_checkpoint):
    scaling = {**LLAMA3_ROPE, "factor": 8.0, "original_max_position_embeddings": 8192}
    directory = make_checkpoint(rope_theta=500_000.0, rope_scaling=scaling, intermediate_size=256)
    expected = loaded_model(directory)(TOKENS)
    as_meta_checkpoint(directory, 1)
    params = json.loads((directory / "params.json").read_text())
    (directory / "params.json").write_text(json.dumps(params | {"use_scaled_rope": True, "rope_theta": 500_000.0}))
    torch.testing.assert_close(loaded_model(directory)(TOKENS), expected)


@torch.no_grad()
@pytest.mark.parametrize("head_dim", [32, 16])
def test_metas_layout_may_state_the_width_of_heads(make_checkpoint, head_dim):
    """16 is the heads' share of the width."""
    directory = make_checkpoint(head_dim=head_dim, intermediate_size=256)
    expected = loaded_model(directory)(TOKENS)
    as_meta_checkpoint(directory, 1)
    params = json.loads((directory / "params.json").read_text())
    (directory / "params.json").write_text(json.dumps(params | {"head_dim": head_dim}))
    torch.testing.assert_close(loaded_model(directory)(TOKENS), expected)
