"""`trainable_tokens`: tokens that a base lacks are trained, kept with the adapter, and known wherever it is used."""

import json

import pytest
import torch
from safetensors.torch import load_file

from custom_components.models.builders import lora_llama_from_config
from custom_components.transforms.chat_transform import ChatTransform
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.checkpoint_files import open_checkpoint
from tests.support.models import ALL_ATTENTION, inference_model
from tests.support.paths import PROJECT
from tests.support.recipe_runs import arguments, run_here, run_merge, tune_run
from tests.support.run_results import assert_equal, outcome

TOKENS = ["<|im_start|>", "<|im_end|>"]
CHATML = ("prompt_template=chatml", f"trainable_tokens={json.dumps(TOKENS)}", "learning_rate=1e-2")


@pytest.fixture
def chatml_run(make_checkpoint, many_rows, tmp_path):
    """A checkpoint without the tokens, and the arguments of a run on it."""
    checkpoint = make_checkpoint()
    return checkpoint, lambda name, *overrides: arguments(checkpoint, many_rows, tmp_path / name, *CHATML, *overrides)


def test_new_tokens_are_trained_resumed_asked_measured_and_merged(chatml_run, many_rows, tmp_path):
    checkpoint, run = chatml_run
    for name, *overrides in [
        ("whole", "max_steps=4"),
        ("stopped", "max_steps=2"),
        ("stopped", "max_steps=4", "resume_from_checkpoint=true"),
    ]:
        result = tune_run(*run(name, "save_every_n_steps=2", "lr_scheduler._component_=custom_components.training."
                               "schedules.constant", "warmup_ratio=0", *overrides))  # fmt: skip
        assert result.returncode == 0, result.stderr
    assert "new tokens: <|im_start|> is 1024, <|im_end|> is 1025" in result.stdout
    assert_equal(outcome(tmp_path / "whole")[1], outcome(tmp_path / "stopped")[1])

    adapter = tmp_path / "whole/adapter"
    stored = open_adapter(adapter)
    assert stored.config.token_ids == {"tok_embeddings": [1024, 1025], "output": [1024, 1025]}
    base = open_checkpoint(checkpoint)
    for key, name in (("model.embed_tokens", "tok_embeddings"), ("lm_head", "output")):
        rows = load_file(adapter / "adapter_model.safetensors")[
            f"base_model.model.{key}.token_adapter.trainable_tokens_delta"
        ]
        began = base.tensors[f"{name}.weight"].read().mean(dim=0)
        assert (rows - began).abs().amax(dim=1).min() > 1e-3  # each has learned
    assert "model.resize_token_embeddings(1026)" in (adapter / "README.md").read_text()
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    assert tokenizer.convert_tokens_to_ids(TOKENS) == [1024, 1025]
    dialog = [{"role": "user", "content": "left blue"}]
    ours = ChatTransform(checkpoint, prompt_template="chatml", adapter_dir=adapter)
    tokens = ours({"messages": dialog}, inference=True)["tokens"]
    assert 1024 in tokens and 1025 in tokens and 1025 in ours.stop_tokens
    text = tokenizer.apply_chat_template(dialog, tokenize=False, add_generation_prompt=True)
    assert tokenizer.encode(text, add_special_tokens=False) == tokens

    asked = {"checkpoint_dir": checkpoint, "adapter_dir": adapter, "device": "cpu", "dtype": "fp32"}
    code, answer, err = run_here(
        "generate",
        *("--config", "configs/generate.yaml", "prompt=left blue", "max_new_tokens=8", "compare=true"),
        *(f"{key}={value}" for key, value in asked.items()),
    )
    assert code == 0, err
    code, measured, err = run_here(
        "evaluate",
        *("--config", "configs/evaluate.yaml", f"dataset.source={many_rows}"),
        *(f"{key}={value}" for key, value in asked.items()),
    )
    assert code == 0 and "2 added tokens (<|im_start|>, <|im_end|>)" in measured, err

    code, _, err = run_merge(checkpoint_dir=checkpoint, adapter_dir=adapter, output_dir=tmp_path / "merged")
    assert code == 0, err
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    expected = inference_model(checkpoint, adapter)
    ids = torch.tensor([tokens])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, expected(ids), atol=1e-4, rtol=0)
    merged_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged_tokenizer.encode(text, add_special_tokens=False) == tokens
    code, alone, err = run_here(
        "generate",
        *("--config", "configs/generate.yaml", "prompt=left blue", "max_new_tokens=8", "device=cpu", "dtype=fp32"),
        f"checkpoint_dir={tmp_path / 'merged'}",
    )
    assert code == 0 and alone.strip() == answer.partition("tuned")[2].strip(), err

    gguf = pytest.importorskip("gguf")
    code, _, err = run_merge(
        checkpoint_dir=checkpoint, adapter_dir=adapter, output_dir=tmp_path / "gguf", format="gguf"
    )
    assert code == 0, err
    reader = gguf.GGUFReader(next((tmp_path / "gguf").glob("*.gguf")))
    assert reader.get_field("tokenizer.ggml.tokens").contents()[-2:] == TOKENS
    code, _, err = run_merge(
        checkpoint_dir=checkpoint, adapter_dir=adapter, output_dir=tmp_path / "lora", format="gguf_lora"
    )
    assert code == 2 and "no tokens in adapters" in err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["prompt_template=llama2"], "trainable_tokens: the prompt template does not name '<|im_start|>'"),
        (["apply_lora_to_output=true"], "trainable_tokens: beside apply_lora_to_output true"),
        (["trainable_tokens=['</s>', '</s>']"], "has a token twice"),
        (["trainable_tokens=['']"], "trainable_tokens"),
        (["~tokenizer.trainable_tokens"], "trainable_tokens: does not reach the tokenizer"),
    ],
)
def test_tokens_that_nothing_would_train_are_refused(chatml_run, overrides, words):
    _, run = chatml_run
    code, _, err = run_here("lora_single_device", *run("refused", *overrides))
    assert code == 2 and words in err and err.count("\n") == 1, err


def test_tokens_are_rows_beside_an_adapter_only(many_rows, tmp_path):
    full = ["--config", str(PROJECT / "configs/tiny_full.yaml"), f"dataset.source={many_rows}", "device=cpu"]
    full += [f"output_dir={tmp_path / 'full'}", "cache_dir=null", "tokenizer.trainable_tokens=['</s>']"]
    code, _, err = run_here("full_single_device", *full)
    assert code == 2 and "tokenizer.trainable_tokens: are rows beside an adapter" in err


def test_the_estimate_counts_the_rows(chatml_run):
    checkpoint, run = chatml_run
    _, words, _ = run_here("estimate", *run("unused"))
    num_trained = int(words.partition(" trained")[0].rpartition(" ")[2].replace(",", ""))
    adapted = lora_llama_from_config(checkpoint, ALL_ATTENTION, apply_lora_to_mlp=True, lora_rank=16)
    num_adapted = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert num_trained - num_adapted == 2 * 2 * 64  # two tokens, in the embedding and in the head
