"""llama.cpp and its converters on models that are not Llama 2 as published: the same files, tokens and answers.

Needs llama-cpp-python, or a checkout of llama.cpp in LLAMA_CPP_SOURCES.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from custom_components.generation.decoding import generate
from custom_components.generation.incremental import IncrementalLlama
from custom_components.generation.sampling import Sampling
from custom_components.transforms.prompt_format import read_prompt_format, tokenizer_with_format
from tests.support.llama_cpp import converted_by_llama_cpp, in_llama_cpp, llama_cpp_logits
from tests.support.models import inference_model
from tests.support.other_llamas import OTHER_LLAMAS, OtherLlama
from tests.support.recipe_runs import arguments, run_here, run_merge
from tests.support.rows import random_dialogs, write_dialogs

pytestmark = pytest.mark.slow
gguf = pytest.importorskip("gguf")

# f16 has 11 significant bits; relative to the largest logit.
F16_TOLERANCE = 5e-3


@dataclass(frozen=True)
class Exports:
    """A small model that was trained for two steps, its adapter, and what it was merged to."""

    name: str
    llama: OtherLlama
    checkpoint: Path
    directory: Path

    @property
    def adapter(self) -> Path:
        return self.directory / "out/adapter"

    @property
    def hugging_face(self) -> Path:
        return self.merged("hugging_face")

    def merged(self, name: str, **options: str) -> Path:
        output_dir = self.directory / name
        if not output_dir.exists():
            directories = {"checkpoint_dir": self.checkpoint, "adapter_dir": self.adapter, "output_dir": output_dir}
            code, _, err = run_merge(**directories, **options)
            assert code == 0, err
        return output_dir

    def gguf(self, quantization: str) -> Path:
        return next(self.merged(quantization, format="gguf", quantization=quantization).glob("*.gguf"))


@pytest.fixture(scope="module", params=OTHER_LLAMAS)
def exports(request, tmp_path_factory):
    llama, directory = OTHER_LLAMAS[request.param], tmp_path_factory.mktemp(request.param)
    checkpoint = llama.write(directory)
    rows = write_dialogs(directory / "rows.jsonl", random_dialogs(8))
    settings = [f"prompt_template={llama.template}", "max_steps=2", "lora_rank=4", "learning_rate=0.02"]
    code, _, err = run_here(
        *("lora_single_device", *arguments(checkpoint, rows, directory / "out", *settings)),
        *("device=cpu", "dtype=fp32", "quantize_base=true"),
    )
    assert code == 0, err
    return Exports(request.param, llama, checkpoint, directory)


def values_of(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def tensors_of(path: Path) -> dict[str, tuple[Any, bytes]]:
    return {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in gguf.GGUFReader(path).tensors}


def differences(exports: Exports, theirs: dict[str, Any]) -> dict[str, Any]:
    """What the converter writes otherwise, on purpose: by key, their value, or ANY; absent: ours is there alone."""
    head_dim = theirs["llama.rope.dimension_count"]
    tokenizer = {
        # It leaves out what readers take for granted, and tokens that end a turn but are not EOS.
        **dict.fromkeys(("add_eos_token", "add_space_prefix", "add_sep_token", "eot_token_id", "eom_token_id"), ANY),
    }
    if not exports.llama.begins_with_bos:
        tokenizer["add_bos_token"] = True  # for it a Llama always puts BOS; the chat format was trained without
    if exports.name == "json":
        # Without tokenizer.model it gives every piece the same score, and its two tokens are not special to it.
        tokenizer |= {"scores": ANY, "token_type": ANY}
    others = {"general.name": ANY, "general.size_label": ANY, "general.tags": ANY, "GGUF.kv_count": ANY}
    if exports.name == "mistral":
        others["llama.context_length"] = 256  # the window of attention is 128
    else:
        others |= {f"llama.attention.{part}_length": head_dim for part in ("key", "value")}
    return others | {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}


ANY = object()


@pytest.mark.parametrize("quantization", ["f16", "q8_0"])
def test_a_file_is_that_of_llama_cpps_converter(exports, tmp_path, quantization):
    """Every tensor byte for byte, and every value but those that are named."""
    ours = exports.gguf(quantization)
    theirs = converted_by_llama_cpp(
        "convert_hf_to_gguf.py", exports.hugging_face, tmp_path / "theirs.gguf", "--outtype", quantization
    )
    our_tensors, their_tensors = tensors_of(ours), tensors_of(theirs)
    assert our_tensors.keys() == their_tensors.keys()
    assert [name for name in our_tensors if our_tensors[name] != their_tensors[name]] == []
    our_values, their_values = values_of(ours), values_of(theirs)
    allowed = differences(exports, their_values)
    different = {
        key: their_values.get(key)
        for key in our_values.keys() | their_values.keys()
        if our_values.get(key) != their_values.get(key)
    }
    assert {key: value for key, value in different.items() if allowed.get(key, ...) not in (ANY, value)} == {}


def test_an_adapter_is_that_of_llama_cpps_converter(exports, tmp_path):
    if exports.name == "meta":
        pytest.skip("the converter reads the base's config.json, which Meta's layout does not have")
    ours = tensors_of(next(exports.merged("lora", format="gguf_lora").glob("*.gguf")))
    theirs = tensors_of(
        converted_by_llama_cpp(
            *("convert_lora_to_gguf.py", exports.adapter, tmp_path / "theirs.gguf"),
            *("--base", str(exports.checkpoint), "--outtype", "f32"),
        )
    )
    assert ours == theirs


def test_prompts_and_answers_are_ours(exports):
    """Greedy answers to prompts that llama.cpp tokenizes as rendered by the template in the file."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not there: pip install llama-cpp-python")
    ours = tokenizer_with_format(exports.checkpoint, read_prompt_format(exports.adapter))
    base = inference_model(exports.hugging_face)
    questions = ["Where to?", "  Où  est 漢字 🙂\n", "one two 1234"]
    dialogs = [[{"role": "user", "content": question}] for question in questions]
    dialogs.append([*dialogs[0], {"role": "assistant", "content": "There."}, *dialogs[2]])
    dialogs.append([{"role": "system", "content": "Be kind."}, *dialogs[1]])
    prompts = [ours({"messages": dialog}, inference=True)["tokens"] for dialog in dialogs]
    answers = generate(
        IncrementalLlama(base), prompts, max_new_tokens=16, stop_tokens=ours.stop_tokens, sampling=Sampling()
    )
    pieces = ours.tokenizer.named_pieces
    with in_llama_cpp(exports.gguf("f16")) as model:
        template = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
            model.metadata["tokenizer.chat_template"], eos_token=pieces["eos_token"], bos_token=pieces["bos_token"]
        )
        for dialog, prompt, answer in zip(dialogs, prompts, answers, strict=True):
            rendered = template(messages=dialog).prompt.encode()
            assert model.tokenize(rendered, add_bos=False, special=True) == prompt
            tokens = prompt + answer
            with torch.no_grad():
                expected_TV = base(torch.tensor([tokens]))[0]
            logits_TV = llama_cpp_logits(model, tokens)
            assert (logits_TV - expected_TV).abs().max() <= F16_TOLERANCE * expected_TV.abs().max()
            # Each token is also theirs, but where two are as likely.
            chosen_T = logits_TV[len(prompt) - 1 :].argmax(dim=1)
            expected_TV = expected_TV[len(prompt) - 1 :]
            margins_T = expected_TV.amax(dim=1) - expected_TV.gather(1, chosen_T[:, None]).squeeze(1)
            assert (margins_T <= F16_TOLERANCE * expected_TV.abs().max()).all()
        vocabulary = llama_cpp.llama_model_get_vocab(model.model)
        ends = [token for token in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocabulary, token)]
        assert set(ours.stop_tokens) <= set(ends)
