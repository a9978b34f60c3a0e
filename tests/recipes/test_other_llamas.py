"""Models that are not Llama 2 as published, from preview to GGUF, by their shapes, their tokenizers and their files."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from custom_components.transforms.prompt_format import read_prompt_format, tokenizer_with_format
from tests.support.chat_templates import CHATML_JINJA, LLAMA3_1_JINJA, ZEPHYR_JINJA
from tests.support.checkpoints import as_meta_checkpoint, write_checkpoint
from tests.support.go_template import rendered_in_python
from tests.support.modelfile import ollama_prompt
from tests.support.recipe_runs import arguments, run_here, run_merge
from tests.support.rows import random_dialogs, write_dialogs
from tests.support.tokenizers import (
    write_byte_fallback_tokenizer,
    write_byte_level_tokenizer,
    write_sentencepiece_model,
    write_tiktoken_file,
)


def llama3_2(folder: Path) -> Path:
    """Tied, with scaled rotary positions, and tokenizer.json only."""
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    directory = write_checkpoint(
        folder / "llama3_2",
        tie_word_embeddings=True,
        rope_theta=500_000.0,
        rope_scaling={**scaling, "original_max_position_embeddings": 64},
        vocab_size=512,
    )
    (directory / "tokenizer.model").unlink()
    write_byte_level_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(LLAMA3_1_JINJA)
    ids = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    stops = [token["id"] for token in ids if token["content"] in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return directory


def mistral(folder: Path) -> Path:
    """A window on attention, heads of their own width, and control tokens in the SentencePiece model."""
    directory = write_checkpoint(
        folder / "mistral", model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=128, head_dim=32
    )
    write_sentencepiece_model(directory / "tokenizer.model", ["[INST]", "[/INST]"])
    return directory


def chatml_llama2(folder: Path) -> Path:
    """Two tokens are added to Llama 2's kind of tokenizer."""
    directory = write_checkpoint(folder / "chatml", vocab_size=1026)
    (directory / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 1024, "<|im_end|>": 1025}))
    (directory / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    )
    (directory / "chat_template.jinja").write_text(CHATML_JINJA)
    return directory


def llama2_without_model_file(folder: Path) -> Path:
    """Its SentencePiece model is a tokenizer.json only, as transformers 5 writes it."""
    directory = write_checkpoint(folder / "json", vocab_size=1026)
    (directory / "tokenizer.model").unlink()
    write_byte_fallback_tokenizer(directory, "first")
    (directory / "chat_template.jinja").write_text(ZEPHYR_JINJA)
    return directory


def llama3_of_meta(folder: Path) -> Path:
    """params.json, consolidated.00.pth and tokenizer.model, as in Meta's own downloads."""
    directory = write_checkpoint(folder / "meta", rope_theta=500_000.0, vocab_size=640, intermediate_size=256)
    as_meta_checkpoint(directory, 1)
    write_tiktoken_file(directory / "tokenizer.model")
    params = json.loads((directory / "params.json").read_text())
    (directory / "params.json").write_text(json.dumps(params | {"rope_theta": 500_000.0, "use_scaled_rope": True}))
    return directory


MODELS = {
    "llama3_2": (llama3_2, "auto", "llama3_1", ["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"]),
    "mistral": (mistral, "mistral", "mistral_v3", ["</s>"]),
    "json": (llama2_without_model_file, "auto", "zephyr", ["</s>"]),
    "meta": (llama3_of_meta, "llama3", "llama3", ["<|eot_id|>", "<|end_of_text|>"]),
    "chatml": (chatml_llama2, "auto", "chatml", ["<|im_end|>", "</s>"]),
}


def done(recipe: str, *overrides: str) -> str:
    code, out, err = run_here(recipe, *overrides)
    assert code == 0, err
    return out


@pytest.mark.parametrize(
    "name",
    ["llama3_2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "json", "meta", "chatml"))],
)
def test_from_preview_to_gguf(tmp_path, name):
    gguf = pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    make, template, chosen, stops = MODELS[name]
    checkpoint = make(tmp_path)
    rows = write_dialogs(tmp_path / "rows.jsonl", random_dialogs(8))
    output = tmp_path / "out"
    training = arguments(checkpoint, rows, output, f"prompt_template={template}", "max_steps=4", "save_every_n_steps=2")
    training += ["lora_rank=4", "device=cpu", "dtype=fp32", "quantize_base=true"]

    shown = done("preview", *training)
    assert stops[0].strip("<>") in shown
    done("lora_single_device", *training, "max_steps=2")
    done(
        "lora_single_device",
        *training,
        f"resume_from_checkpoint={output}/checkpoints/step_000002",
        "overwrite_output_dir=false",
    )
    prompt_format = yaml.safe_load((output / "adapter/prompt_format.yaml").read_text())
    assert (prompt_format["prompt_template"], prompt_format["stop_tokens"]) == (chosen, stops)
    of_adapter = [f"checkpoint_dir={checkpoint}", f"adapter_dir={output}/adapter", "device=cpu"]
    done("evaluate", "--config", "configs/evaluate.yaml", *of_adapter, f"dataset.source={rows}")
    answer = done("generate", "--config", "configs/generate.yaml", *of_adapter, "prompt=Where to?", "max_new_tokens=8")

    ours = tokenizer_with_format(checkpoint, read_prompt_format(output / "adapter"))
    question = [{"role": "user", "content": "Where to?"}]
    prompt = ours({"messages": question}, inference=True)["tokens"]
    merged = tmp_path / "merged"
    code, out, err = run_merge(checkpoint_dir=checkpoint, adapter_dir=output / "adapter", output_dir=merged)
    assert code == 0, err
    theirs = transformers.AutoTokenizer.from_pretrained(merged)
    assert theirs.apply_chat_template(question, add_generation_prompt=True, return_dict=False) == prompt
    model = transformers.AutoModelForCausalLM.from_pretrained(merged)
    generated = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0][len(prompt) :].tolist()
    ends = [index for index, token in enumerate(generated) if token in ours.stop_tokens]
    assert ours.decode(generated[: ends[0] if ends else None]).strip() == answer.strip()

    in_gguf = tmp_path / "in_gguf"
    code, out, err = run_merge(
        checkpoint_dir=checkpoint, adapter_dir=output / "adapter", output_dir=in_gguf, format="gguf"
    )
    assert code == 0, err
    reader = gguf.GGUFReader(next(in_gguf.glob("*.gguf")))

    def field(key):
        return reader.get_field(key).contents()

    assert field("tokenizer.ggml.model") == ("gpt2" if name in ("llama3_2", "meta") else "llama")
    assert field("tokenizer.ggml.eos_token_id") in ours.stop_tokens
    assert field("tokenizer.ggml.add_bos_token") is (name not in ("chatml", "json"))
    if name in ("llama3_2", "meta"):
        assert field("tokenizer.ggml.pre") == "llama-bpe"
        [divisors] = [tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
        assert divisors.data.shape == (8,) and divisors.data.max() == (32 if name == "llama3_2" else 8)
    asked = ollama_prompt((in_gguf / "Modelfile").read_text(), question, rendered_in_python)
    bos = [ours.bos_id] if field("tokenizer.ggml.add_bos_token") else []
    assert bos + theirs(asked, add_special_tokens=False).input_ids == prompt
