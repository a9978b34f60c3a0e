"""L22: a merge is base + adapter, and proves it. L23: transformers loads what is written, as it is."""

import re

import pytest
import torch
import yaml
from torchtune.modules.peft import disable_adapter

from custom_components.export import merged_weights
from custom_components.export.merge_proof import compared, logits_with_adapters
from custom_components.export.merged_weights import BaseWeights, read_adapter
from custom_components.models import lora
from custom_components.models.dora import DoRALinear
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.weights import hugging_face_writing as hugging_face_export
from custom_components.weights import safetensors_writing as safetensors_streaming
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.checkpoint_files import open_checkpoint
from tests.support.adapters import saved_adapter
from tests.support.models import (
    TOKENS,
    inference_model,
    loaded_model,
    merged_dora_weight,
    merged_lora_weight,
    with_random_variants,
)
from tests.support.paths import TINY_LLAMA
from tests.support.recipe_runs import run_merge

LORA = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "some modules": {"lora_attn_modules": ["k_proj"], "apply_lora_to_mlp": False},
    "head": {"apply_lora_to_output": True},
    "DoRA and head": {"use_dora": True, "apply_lora_to_output": True},
}


def largest_difference_printed(out):
    """The proof's figure of merged against base + adapter."""
    return float(re.search(r"weights \+ adapter: largest logit difference (\S+)", out)[1])


@torch.no_grad()
def their_logits(directory):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model(TOKENS).logits


@torch.no_grad()
def our_logits(checkpoint, adapter, quantize_base=False):
    return inference_model(checkpoint, adapter, quantize_base)(TOKENS)


@pytest.mark.parametrize(
    ("name", "tied", "base"),
    [
        *(("LoRA", False, "original"), ("LoRA", True, "dequantized"), ("rsLoRA", False, "dequantized")),
        *(("DoRA", False, "original"), ("DoRA", False, "dequantized"), ("some modules", True, "original")),
        *(("head", False, "original"), ("head", True, "original"), ("DoRA and head", True, "dequantized")),
    ],
)
def test_L22_L23_transformers_gives_the_logits_of_base_and_adapter(
    make_checkpoint,
    tmp_path,
    name,
    tied,
    base,
):
    checkpoint = make_checkpoint(tie_word_embeddings=tied)
    model = loaded_model(checkpoint, lora_alpha=7.0, quantize_base=base == "dequantized", **LORA[name])
    adapter = saved_adapter(with_random_variants(model), tmp_path / "adapter")
    code, out, err = run_merge(
        checkpoint_dir=checkpoint, adapter_dir=adapter, output_dir=tmp_path / "merged", base=base
    )
    assert code == 0, err
    assert largest_difference_printed(out) < 1e-4
    expected = our_logits(checkpoint, adapter, quantize_base=base == "dequantized")
    torch.testing.assert_close(their_logits(tmp_path / "merged"), expected, atol=1e-4, rtol=0)
    assert (our_logits(checkpoint, None) - expected).abs().max() > 0.1, "an adapter without effect would show nothing"


@pytest.mark.parametrize("quantize_base", [False, True])
def test_L22_L23_of_a_trained_checkpoint(test_data, tmp_path, quantize_base):
    """stories260K: grouped-query heads, tied embeddings, a tokenizer that joins spaces."""
    checkpoint = test_data("stories260K/config.json").parent
    model = with_random_variants(loaded_model(checkpoint, quantize_base=quantize_base))
    adapter = saved_adapter(model, tmp_path / "adapter")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"quantize_base": quantize_base}))
    for base in ("original", "dequantized"):
        directory = tmp_path / base
        code, out, err = run_merge(checkpoint_dir=checkpoint, adapter_dir=adapter, output_dir=directory, base=base)
        assert code == 0, err
        assert ("NF4 weights + adapter, as trained" in out) == (quantize_base and base == "original")
        expected = our_logits(checkpoint, adapter, quantize_base=base == "dequantized")
        torch.testing.assert_close(their_logits(directory), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variants", [{}, {"use_dora": True}])
def test_L22_several_adapters_with_weights(make_checkpoint, tmp_path, variants):
    checkpoint = make_checkpoint()
    settings = [{"lora_rank": 2, **variants}, {"lora_rank": 4, "use_rslora": True, "apply_lora_to_mlp": False}]
    models = [with_random_variants(loaded_model(checkpoint, seed=seed, **lora)) for seed, lora in enumerate(settings)]
    first, second = (saved_adapter(model, tmp_path / f"adapter {number}") for number, model in enumerate(models))

    def merge(name, *weighted):
        adapters = [{"dir": str(directory), "weight": weight} for directory, weight in weighted]
        code, out, err = run_merge(
            checkpoint_dir=checkpoint, adapter_dir="null", adapters=adapters, output_dir=tmp_path / name
        )
        assert code == 0, err
        assert largest_difference_printed(out) < 1e-4
        return their_logits(tmp_path / name)

    merge("both", (first, 0.7), (second, -0.4))
    of_one = merge("one", (first, 1.0), (second, 0.0))
    torch.testing.assert_close(of_one, our_logits(checkpoint, first), atol=1e-4, rtol=0)
    base = BaseWeights(open_checkpoint(checkpoint))
    weights = {first: 0.7, second: -0.4}
    adapters = [read_adapter(base.checkpoint, open_adapter(path), weight) for path, weight in weights.items()]
    merged_weights = BaseWeights(open_checkpoint(tmp_path / "both"))
    for name in ("layers.0.attn.q_proj.weight", "layers.1.mlp.w2.weight"):
        expected = base.read(name).clone()
        for factor, model in zip((0.7, -0.4), models, strict=True):
            layer = model.get_submodule(name.removesuffix(".weight"))
            if hasattr(layer, "lora_a"):
                one = merged_dora_weight(layer) if isinstance(layer, DoRALinear) else merged_lora_weight(layer)
                expected += factor * (one - layer.weight).detach()
        torch.testing.assert_close(merged_weights.read(name), expected, atol=1e-5, rtol=0)
    rows = TOKENS.tolist()
    proof = compared(logits_with_adapters(merged_weights, [], rows), logits_with_adapters(base, adapters, rows))
    assert proof.largest_difference < 1e-4


def test_L22_the_proofs_reference_is_the_model_that_answers(make_checkpoint, tmp_path):
    """The streamed logits of base + adapter, and of the base, are those of the model in memory."""
    checkpoint = make_checkpoint()
    adapter = saved_adapter(with_random_variants(loaded_model(checkpoint, use_dora=True)), tmp_path / "adapter")
    model = inference_model(checkpoint, adapter)
    base = BaseWeights(open_checkpoint(checkpoint))
    with torch.no_grad():
        adapters = [read_adapter(base.checkpoint, open_adapter(adapter))]
        streamed = logits_with_adapters(base, adapters, TOKENS.tolist())
        torch.testing.assert_close(streamed, model(TOKENS).flatten(0, 1), atol=1e-4, rtol=0)
        with disable_adapter(model):
            expected = model(TOKENS).flatten(0, 1)
    torch.testing.assert_close(logits_with_adapters(base, [], TOKENS.tolist()), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("broken", ["scaling", "row order", "a byte on the disk", "overflow"])
def test_L22_a_wrong_merge_is_found_and_not_left_there(
    make_checkpoint,
    tmp_path,
    monkeypatch,
    broken,
):
    checkpoint = make_checkpoint()
    model = with_random_variants(loaded_model(checkpoint))
    if broken == "overflow":
        model.layers[0].mlp.w1.lora_b.weight.data *= 1e6
    adapter = saved_adapter(model, tmp_path / "adapter")
    overrides = {"dtype": "fp16"} if broken == "overflow" else {}
    if broken == "scaling":
        right = lora.merged_weight
        monkeypatch.setattr(
            merged_weights, "merged_weight", lambda w, changes: right(w, [(2 * c, a) for c, a in changes])
        )
    if broken == "row order":
        monkeypatch.setattr(hugging_face_export, "halve_rope_rows", lambda weight, num_heads: weight)
    if broken == "a byte on the disk":
        right_header = safetensors_streaming._header
        monkeypatch.setattr(safetensors_streaming, "_header", lambda *a: right_header(*a)[:-8] + b" " * 7 + b"}")
    code, _, err = run_merge(
        checkpoint_dir=checkpoint, adapter_dir=adapter, output_dir=tmp_path / "merged", **overrides
    )
    assert code == 2 and err.count("error: ") == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "checkpoint"]


def test_L23_a_generation_config_of_2023_can_be_saved_again(make_checkpoint, tmp_path):
    """Llama 2's had a temperature without do_sample, which transformers reads but refuses to write."""
    transformers = pytest.importorskip("transformers")
    checkpoint = make_checkpoint(_name_or_path="meta-llama/Llama-2-7b-hf")
    (checkpoint / "generation_config.json").write_text('{"bos_token_id": 1, "temperature": 0.9, "top_p": 0.6}')
    adapter = saved_adapter(with_random_variants(loaded_model(checkpoint)), tmp_path / "adapter")
    code, out, err = run_merge(checkpoint_dir=checkpoint, adapter_dir=adapter, output_dir=tmp_path / "out")
    assert code == 0, err
    assert "do_sample is set to true" in out
    config = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    config.validate(strict=True)
    assert (config.do_sample, config.temperature, config.top_p) == (True, 0.9, 0.6)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    assert "_name_or_path" not in (tmp_path / "out/config.json").read_text()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "auto"])
def test_L23_the_dtype_that_was_asked_for(make_checkpoint, tmp_path, dtype):
    transformers = pytest.importorskip("transformers")
    checkpoint = make_checkpoint()
    adapter = saved_adapter(with_random_variants(loaded_model(checkpoint)), tmp_path / "adapter")
    code, _, err = run_merge(checkpoint_dir=checkpoint, adapter_dir=adapter, output_dir=tmp_path / "out", dtype=dtype)
    assert code == 0, err
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "auto": torch.float32}[dtype]
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_L23_shards_tokenizer_and_generation_config(tmp_path, monkeypatch):
    """The embedded model, which answers in the merged directory what it answers here."""
    transformers = pytest.importorskip("transformers")
    checkpoint = TINY_LLAMA / "checkpoint"
    adapter = saved_adapter(with_random_variants(loaded_model(checkpoint)), tmp_path / "adapter")
    prompt_format = (adapter / "prompt_format.yaml").read_text()
    (adapter / "prompt_format.yaml").write_text(prompt_format.replace("- </s>", "- </s>\n- \u2581the"))
    right = hugging_face_export.write_safetensors
    monkeypatch.setattr(hugging_face_export, "write_safetensors", lambda *a: right(*a[:-1], max_shard_bytes=2_000_000))
    code, _, err = run_merge(checkpoint_dir=checkpoint, adapter_dir=adapter, output_dir=tmp_path / "out", dtype="fp32")
    assert code == 0, err
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(their_logits(tmp_path / "out"), our_logits(checkpoint, adapter), atol=1e-4, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = Llama2ChatTransform(checkpoint / "tokenizer.model", system_prompt="Be kind.")
    messages = [{"role": "user", "content": "Où  est\n  la mer ?"}]
    expected = ours({"messages": messages}, inference=True)["tokens"]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == expected
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert model.generation_config.eos_token_id == ours.ids_of_pieces(["</s>", "\u2581the"])
    assert model.generation_config.bos_token_id == ours.bos_id


def test_L23_a_checkpoint_in_metas_format(make_checkpoint, tmp_path):
    """Where there is no config.json, one is made."""
    import json

    from torchtune.models.convert_weights import _FROM_META

    hugging_face = make_checkpoint("hf", num_key_value_heads=4, intermediate_size=192, vocab_size=1024)
    model = loaded_model(hugging_face, lora_attn_modules=[], apply_lora_to_mlp=False)
    meta = tmp_path / "meta"
    meta.mkdir()
    names = {tune: theirs for theirs, tune in _FROM_META.items() if tune is not None}
    tensors = {}
    for name, tensor in model.state_dict().items():
        layer = re.search(r"\.(\d+)\.", name)
        pattern = re.sub(r"\.\d+\.", ".{}.", name)
        tensors[names[pattern].format(layer[1] if layer else "")] = tensor
    torch.save(tensors, meta / "consolidated.00.pth")
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "multiple_of": 64, "norm_eps": 1e-5, "vocab_size": 1024}
    (meta / "params.json").write_text(json.dumps(params))
    (meta / "tokenizer.model").write_bytes((hugging_face / "tokenizer.model").read_bytes())
    adapter = saved_adapter(with_random_variants(loaded_model(meta)), tmp_path / "adapter")
    code, _, err = run_merge(checkpoint_dir=meta, adapter_dir=adapter, output_dir=tmp_path / "merged")
    assert code == 0, err
    torch.testing.assert_close(their_logits(tmp_path / "merged"), our_logits(meta, adapter), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("quantization", "precision"), [("f16", 5e-3), ("q8_0", 0.1)])
@pytest.mark.parametrize("tied", [False, True])
def test_L22_a_gguf_file_is_read_back_for_the_proof(make_checkpoint, tmp_path, quantization, precision, tied):
    pytest.importorskip("gguf")
    checkpoint = make_checkpoint(tie_word_embeddings=tied)
    model = with_random_variants(loaded_model(checkpoint, apply_lora_to_output=True))
    adapter = saved_adapter(model, tmp_path / "adapter")
    code, out, err = run_merge(
        checkpoint_dir=checkpoint,
        adapter_dir=adapter,
        output_dir=tmp_path / "merged",
        format="gguf",
        quantization=quantization,
    )
    assert code == 0, err
    assert [path.name for path in (tmp_path / "merged").glob("*.gguf")] == [f"merged-{quantization}.gguf"]
    largest_logit = our_logits(checkpoint, adapter).abs().max().item()
    assert 0 < largest_difference_printed(out) < precision * largest_logit
