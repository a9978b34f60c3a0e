"""Loading checkpoints of every layout, and refusing what is not one."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from custom_components.models.builders import lora_llama2_7b, lora_llama_from_config, lora_open_llama_3b
from custom_components.models.nf4 import is_quantized
from custom_components.runtime.errors import UserError
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.tokenizer_fitting import fit_tokenizer
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.checkpoint_files import open_checkpoint
from custom_components.weights.checkpoint_loading import load_base_weights, unquantized_modules
from custom_components.weights.names import halve_rope_rows, interleave_rope_rows
from tests.support.checkpoints import as_meta_checkpoint, split_into_shards
from tests.support.models import ALL_ATTENTION, CPU, loaded_model
from tests.support.paths import TINY_TOKENIZER

TOKENS = torch.randint(1024, (2, 20), generator=torch.Generator().manual_seed(0))


def logits(checkpoint):
    with torch.no_grad():
        return loaded_model(checkpoint)(TOKENS)


def test_every_layout_gives_the_same_model(make_checkpoint):
    """One safetensors file, shards with an index, .bin shards, Meta's shards of one and two."""
    expected = logits(make_checkpoint("one", intermediate_size=256))
    for suffix in ("safetensors", "bin"):
        checkpoint = make_checkpoint(suffix, intermediate_size=256)
        split_into_shards(checkpoint, suffix)
        assert torch.equal(logits(checkpoint), expected), suffix
    for num_shards in (1, 2):
        checkpoint = make_checkpoint(f"meta{num_shards}", intermediate_size=256)
        as_meta_checkpoint(checkpoint, num_shards)
        assert torch.equal(logits(checkpoint), expected), num_shards


def test_safetensors_win_where_both_lie(make_checkpoint):
    checkpoint = make_checkpoint()
    expected = logits(checkpoint)
    (checkpoint / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert torch.equal(logits(checkpoint), expected)


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_tied_embeddings_under_either_name(make_checkpoint, kept):
    checkpoint = make_checkpoint(tie_word_embeddings=True)
    expected = logits(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    embeddings = tensors.pop("model.embed_tokens.weight")
    names = ("lm_head.weight", "model.embed_tokens.weight") if kept == "both" else (kept,)
    save_file(tensors | {name: embeddings.clone() for name in names}, checkpoint / "model.safetensors")
    assert torch.equal(logits(checkpoint), expected)


def test_the_rows_of_rope_come_back():
    weight = torch.randn(48, 5)
    assert torch.equal(halve_rope_rows(interleave_rope_rows(weight, 4), 4), weight)


def test_trainable_parameters_as_published():
    """Counts of Llama 2 7B and OpenLLaMA 3B that several users published and that arithmetic gives."""
    cases = [
        (lora_llama2_7b, {"lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 8}, 4_194_304),
        (lora_llama2_7b, {"lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 64}, 33_554_432),
        (lora_llama2_7b, {"lora_attn_modules": ALL_ATTENTION, "apply_lora_to_mlp": True, "lora_rank": 16}, 39_976_960),
        (
            lora_open_llama_3b,
            {"lora_attn_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "lora_rank": 8},
            5_324_800,
        ),
    ]
    for builder, settings, expected in cases:
        with torch.device("meta"):
            model = builder(**settings)
        assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == expected


def test_what_is_quantized(make_checkpoint):
    """Linear weights of attention and feed-forward; never embeddings, head or norms; what does not divide is named."""
    model = loaded_model(make_checkpoint(hidden_size=40), torch.bfloat16, quantize_base=True)  # k and v: 20 x 40
    assert unquantized_modules(model) == [f"{layer}.attn.{name}" for layer in (0, 1) for name in ("k_proj", "v_proj")]
    quantized = ("q_proj.weight", "output_proj.weight", "w1.weight", "w2.weight", "w3.weight")
    for name, parameter in model.named_parameters():
        expected = name.endswith(quantized)
        assert is_quantized(parameter) == expected, name


def test_meta_device_leaves_nothing_behind(make_checkpoint):
    model = loaded_model(make_checkpoint(), quantize_base=True, apply_lora_to_output=True)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_the_epsilon_of_the_norms_is_the_checkpoints(make_checkpoint):
    """Llama 2's chat models state another than the base models, and share their builder."""
    built = make_checkpoint("built")
    with torch.device("meta"):
        model = lora_llama_from_config(built, ["q_proj"])
    other = make_checkpoint("other", rms_norm_eps=0.5)
    load_base_weights(model, open_checkpoint(other), torch.float32, CPU)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), loaded_model(other, lora_attn_modules=["q_proj"])(TOKENS))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope scaling = 'yarn'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"model_type": "qwen2"}, "qwen2"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_architectures_that_are_not_built_are_refused_by_name(make_checkpoint, changes, words):
    with pytest.raises(UserError, match=words):
        lora_llama_from_config(make_checkpoint(**changes), ["q_proj"])


def test_bad_checkpoint_directories(make_checkpoint, tmp_path):
    with pytest.raises(UserError, match="is not a directory; download"):
        loaded_model(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither config\.json nor params\.json"):
        loaded_model(tmp_path / "empty")
    no_weights = make_checkpoint("no_weights")
    (no_weights / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        loaded_model(no_weights)
    torn = make_checkpoint("torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        loaded_model(torn)
    sharded = make_checkpoint("sharded")
    split_into_shards(sharded, "safetensors")
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"1 of 2 shards that are not there \(model-00002-of-00002"):
        loaded_model(sharded)


def test_a_tokenizer_larger_than_the_embedding_is_an_error_a_smaller_one_is_said(make_checkpoint, capsys):
    tokenizer = Llama2ChatTransform(TINY_TOKENIZER, max_seq_len=1000)
    with pytest.raises(UserError, match="1024 pieces, the model embeds 1000"):
        fit_tokenizer(tokenizer, loaded_model(make_checkpoint("small", vocab_size=1000)))
    fitted = fit_tokenizer(tokenizer, loaded_model(make_checkpoint("padded", vocab_size=1088)))
    said = capsys.readouterr().out
    assert "padded vocabulary 1088" in said and "1000 is capped to the model's context of 256" in said
    assert fitted.max_seq_len == 256


def test_an_adapter_directory_without_adapter(tmp_path):
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        open_adapter(tmp_path)


@pytest.mark.parametrize("beside", ["consolidated.safetensors", "optimizer.safetensors", "model.fp16.safetensors"])
def test_a_model_s_own_file_is_read_and_not_what_is_beside_it(make_checkpoint, beside):
    checkpoint = make_checkpoint()
    expected = logits(checkpoint)
    save_file({"layers.0.attention.wq.weight": torch.zeros(2, 2)}, checkpoint / beside)
    assert torch.equal(logits(checkpoint), expected)


def test_an_optimizer_s_state_is_no_model(make_checkpoint):
    checkpoint = make_checkpoint()
    expected = logits(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    save_file({"state.0": torch.zeros(2)}, checkpoint / "optimizer.safetensors")
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        logits(checkpoint)
    torch.save(tensors, checkpoint / "pytorch_model.bin")
    assert torch.equal(logits(checkpoint), expected)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "llama3"])
def test_a_rope_scaling_of_factor_one_is_none(make_checkpoint, rope_type):
    """As transformers computes it."""
    transformers = pytest.importorskip("transformers")
    scaling = {"rope_type": rope_type, "factor": 1.0}
    if rope_type == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    checkpoint = make_checkpoint(rope_scaling=scaling)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(logits(checkpoint), theirs(TOKENS).logits, atol=1e-4, rtol=0)
    if rope_type == "dynamic":
        with pytest.raises(UserError, match="rope scaling = 'dynamic' is not supported"):
            open_checkpoint(make_checkpoint("scaled", rope_scaling=scaling | {"factor": 2.0}))


def test_meta_s_vocabulary_is_the_rows_of_its_embedding(make_checkpoint):
    """CodeLlama's params.json has no vocab_size, Llama 2's has -1."""
    expected = logits(make_checkpoint(intermediate_size=256))
    for num_shards, change in ((1, {}), (2, {"vocab_size": -1})):
        checkpoint = make_checkpoint(f"meta{num_shards}", intermediate_size=256)
        as_meta_checkpoint(checkpoint, num_shards)
        params = json.loads((checkpoint / "params.json").read_text())
        del params["vocab_size"]
        (checkpoint / "params.json").write_text(json.dumps(params | change))
        assert open_checkpoint(checkpoint).shape.vocab_size == 1024
        assert torch.equal(logits(checkpoint), expected)


def test_meta_s_params_say_what_they_say(make_checkpoint):
    checkpoint = make_checkpoint(intermediate_size=192)
    expected = logits(checkpoint)
    as_meta_checkpoint(checkpoint, 1)
    params = json.loads((checkpoint / "params.json").read_text())

    def write(**changes):
        (checkpoint / "params.json").write_text(json.dumps(params | changes))

    with pytest.raises(UserError, match="w1"):
        logits(checkpoint)
    write(hidden_dim=192, use_scaled_rope=False)
    assert torch.equal(logits(checkpoint), expected)
    for key, value in {"sliding_window": 4096, "moe": {"num_experts": 8}, "vision_args": {"patch_size": 14}}.items():
        write(hidden_dim=192, **{key: value})
        with pytest.raises(UserError, match=f"params.json: {key} = .* is not supported"):
            open_checkpoint(checkpoint)


def test_what_old_pickles_keep_of_the_rotation_is_left_out(make_checkpoint):
    """transformers before 4.31 stored rotary_emb.inv_freq of each layer, and Meta rope.freqs."""
    checkpoint = make_checkpoint()
    expected = logits(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    rotation = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(2)}
    torch.save(tensors | rotation, checkpoint / "pytorch_model.bin")
    assert torch.equal(logits(checkpoint), expected)
