"""llama.cpp itself on our GGUF files: the same tokens, logits and answers. Needs `pip install llama-cpp-python`."""

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from custom_components.datasets.sources import read_rows
from custom_components.export.gguf import write_gguf
from custom_components.export.gguf_k_quants import quantize_gguf
from custom_components.export.merged_weights import BaseWeights
from custom_components.generation.decoding import generate
from custom_components.generation.incremental import IncrementalLlama
from custom_components.generation.sampling import Sampling
from custom_components.transforms.jinja_template import chat_template
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.tokenizer_files import ExportedTokenizer
from custom_components.transforms.turns import Markup, Turn
from custom_components.weights.checkpoint_files import open_checkpoint
from tests.support.go_template import has_go, rendered_by_go, rendered_in_python
from tests.support.llama_cpp import in_llama_cpp, llama_cpp_answer, llama_cpp_logits
from tests.support.modelfile import ollama_messages, read_modelfile
from tests.support.models import inference_model, loaded_model
from tests.support.paths import PROJECT, TINY_LLAMA
from tests.support.tokenizers import control_pieces_of, exported_tokenizer

pytestmark = pytest.mark.slow
llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not there: pip install llama-cpp-python")

TEXTS = [
    *("Once upon a time", "a", " leading space", "trailing space ", "line\nbreaks\n\nand\ttabs", "1234567890"),
    *("café Zürich 日本語 🦙", "</s> is only text", "[INST] Hello [/INST]", "CAPS and MiXed", "a_b-c(d)[e]{f}"),
]
DIALOGS = [
    ["Hello"],
    ["  Hello  ", " Hi there! ", "And now?\n"],
    ["Zürich 日本語?", "Yes.", "1 + 1", "2", "Thank you."],
]
# f16 has 11 significant bits, in the weights and in what llama.cpp multiplies them with; logits are sums of many such
# products. Relative to the largest logit.
F16_TOLERANCE = 5e-3
Q8_0_TOLERANCE = 1e-1


def export(checkpoint_dir: Path, path: Path, quantization: str = "f16") -> Path:
    weights = BaseWeights(open_checkpoint(checkpoint_dir))
    tokenizer_model = checkpoint_dir / "tokenizer.model"
    template = chat_template("llama2", None, control_pieces_of(tokenizer_model))
    write_gguf(
        path,
        weights.shape,
        ((name, weights.read(name)) for name in weights.shapes),
        tokenizer=exported_tokenizer(tokenizer_model, template),
        quantization=quantization,
        name="exported",
    )
    return path


def chat(turns: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(turns)]


def checkpoint_directory(name: str, make_checkpoint, test_data) -> Path:
    if name == "tiny Llama":
        return TINY_LLAMA / "checkpoint"
    if name == "stories260K":
        return test_data("stories260K")
    if name == "Llama 2's tokenizer":
        directory = make_checkpoint(vocab_size=32_000)
        (directory / "tokenizer.model").write_bytes(test_data("llama2_tokenizer/tokenizer.model").read_bytes())
        return directory
    return make_checkpoint(tie_word_embeddings=True, vocab_size=1088, rope_theta=50_000.0, rms_norm_eps=1e-3)


@pytest.mark.parametrize("name", ["tiny Llama", "Llama 2's tokenizer", "tied and padded"])
def test_texts_and_dialogs_have_our_tokens(make_checkpoint, test_data, tmp_path, name):
    directory = checkpoint_directory(name, make_checkpoint, test_data)
    tokenizer = Llama2ChatTransform(directory / "tokenizer.model")
    path = export(directory, tmp_path / "model.gguf")
    with in_llama_cpp(path) as model:
        for text in TEXTS:
            assert model.tokenize(text.encode(), add_bos=True) == tokenizer.encode(text, add_eos=False), text
        template = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
            model.metadata["tokenizer.chat_template"], eos_token="</s>", bos_token="<s>"
        )
        for turns in DIALOGS:
            rendered = template(messages=chat(turns)).prompt.encode()
            expected = tokenizer({"messages": chat(turns)}, inference=True)["tokens"]
            assert model.tokenize(rendered, add_bos=False, special=True) == expected, turns


@pytest.mark.parametrize("quantization, tolerance", [("f16", F16_TOLERANCE), ("q8_0", Q8_0_TOLERANCE)])
@pytest.mark.parametrize("name", ["tiny Llama", "stories260K", "tied and padded"])
def test_logits_are_ours_up_to_rounding(make_checkpoint, test_data, tmp_path, name, quantization, tolerance):
    directory = checkpoint_directory(name, make_checkpoint, test_data)
    path = export(directory, tmp_path / "model.gguf", quantization)
    tokens = Llama2ChatTransform(directory / "tokenizer.model").encode(" ".join(TEXTS), add_eos=False)
    with torch.no_grad():
        expected_TV = loaded_model(directory, lora_attn_modules=[], apply_lora_to_mlp=False)(torch.tensor([tokens]))[0]
    with in_llama_cpp(path) as model:
        logits_TV = llama_cpp_logits(model, tokens)
    assert (logits_TV - expected_TV).abs().max() <= tolerance * expected_TV.abs().max()


@pytest.mark.parametrize(("quantization", "most_apart"), [("q4_k_m", 0.2), ("q5_k_m", 0.1)])
def test_its_own_quantizer_writes_fewer_bits(tmp_path, quantization, most_apart):
    directory = TINY_LLAMA / "checkpoint"
    path = export(directory, tmp_path / "f16.gguf")
    quantize_gguf(path, tmp_path / "quantized.gguf", quantization)
    assert (tmp_path / "quantized.gguf").stat().st_size < path.stat().st_size / 2
    tokens = Llama2ChatTransform(directory / "tokenizer.model").encode(" ".join(TEXTS), add_eos=False)
    with in_llama_cpp(path) as exact, in_llama_cpp(tmp_path / "quantized.gguf") as model:
        expected_TV, logits_TV = llama_cpp_logits(exact, tokens), llama_cpp_logits(model, tokens)
    assert 0 < (logits_TV - expected_TV).norm() < most_apart * expected_TV.norm()


def test_stories_are_told_alike_but_where_two_words_are_as_likely(test_data, tmp_path):
    directory = test_data("stories260K")
    tokenizer = Llama2ChatTransform(directory / "tokenizer.model")
    path = export(directory, tmp_path / "model.gguf")
    base = inference_model(directory)
    prompts = [
        tokenizer.encode(text, add_eos=False)
        for text in ("Once upon a time", "The little dog", "Tim was a big boy.", '"No!" said the cat', "Lily")
    ]
    answers = generate(
        IncrementalLlama(base), prompts, max_new_tokens=200, stop_tokens=[tokenizer.eos_id], sampling=Sampling()
    )
    with in_llama_cpp(path) as model:
        for prompt, answer in zip(prompts, answers, strict=True):
            theirs = llama_cpp_answer(model, prompt, max_new_tokens=200)
            if theirs == answer:
                continue
            num_same = next(index for index, (a, b) in enumerate(zip(theirs, answer, strict=False)) if a != b)
            with torch.no_grad():
                logits_V = base(torch.tensor([prompt + answer[:num_same]]))[0, -1]
            margin = logits_V[answer[num_same]] - logits_V[theirs[num_same]]
            assert margin <= F16_TOLERANCE * logits_V.abs().max(), tokenizer.decode(prompt + answer[: num_same + 1])


@dataclass(frozen=True)
class Demo:
    """The demo's adapter merged and exported, and what generate answers to the held-out questions."""

    merged_dir: Path
    gguf_dir: Path
    lora: Path
    tokenizer: Llama2ChatTransform
    questions: list[list[dict[str, str]]]
    answers: list[str]

    @property
    def gguf(self) -> Path:
        [path] = self.gguf_dir.glob("*.gguf")
        return path

    def assert_same_answers(self, theirs: Iterable[str]) -> None:
        different = [
            (question[0]["content"], ours, their)
            for question, ours, their in zip(self.questions, self.answers, theirs, strict=True)
            if their.strip() != ours
        ]
        assert not different, f"{len(different)} of {len(self.questions)} answers differ: {different[:5]}"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Demo:
    directory = tmp_path_factory.mktemp("demo")
    run_dir, merged_dir, gguf_dir, lora_dir = (directory / name for name in ("run", "merged", "gguf", "lora"))
    merge = [
        *("recipes/merge.py", "--config", "configs/merge.yaml", f"checkpoint_dir={TINY_LLAMA / 'checkpoint'}"),
        f"adapter_dir={run_dir / 'adapter'}",
    ]
    for command in (
        ["recipes/lora_single_device.py", "--config", "configs/tiny_qlora.yaml", f"output_dir={run_dir}"],
        [*merge, f"output_dir={merged_dir}"],
        [*merge, f"output_dir={gguf_dir}", "format=gguf", "quantization=f16"],
        [*merge, f"output_dir={lora_dir}", "format=gguf_lora"],
    ):
        tune = Path(sys.executable).with_name("tune")
        subprocess.run([tune, "run", *command], cwd=PROJECT, check=True, timeout=600)
    tokenizer = Llama2ChatTransform(merged_dir / "tokenizer.model")
    questions = [row.values["messages"][:1] for row in read_rows(str(TINY_LLAMA / "data/held_out.jsonl"))]
    prompts = [tokenizer({"messages": question}, inference=True)["tokens"] for question in questions]
    model = IncrementalLlama(inference_model(merged_dir))
    answers = generate(model, prompts, max_new_tokens=16, stop_tokens=[tokenizer.eos_id], sampling=Sampling())
    texts = [tokenizer.decode(answer).strip() for answer in answers]
    return Demo(merged_dir, gguf_dir, lora_dir / "lora-lora.gguf", tokenizer, questions, texts)


def chat_answer(model, question: list[dict[str, str]]) -> str:
    """By llama.cpp's own chat with the template in the file."""
    completion = model.create_chat_completion(messages=question, temperature=0.0, repeat_penalty=1.0, max_tokens=16)
    return completion["choices"][0]["message"]["content"]


def test_the_demo_merged_and_exported_answers_every_held_out_question_alike(demo):
    """Greedy, against generate on the merged directory."""
    with in_llama_cpp(demo.gguf) as model:
        demo.assert_same_answers(chat_answer(model, question) for question in demo.questions)


def test_L40_prompts_by_the_modelfile_are_answered_alike(demo, tmp_path):
    """As Ollama asks: the Modelfile's template rendered, by Go where it is there, and BOS put before it."""
    modelfile = (demo.gguf_dir / "Modelfile").read_text()
    template = dict(read_modelfile(modelfile))["TEMPLATE"]
    dialogs = [ollama_messages(modelfile, question) for question in demo.questions]
    # What a model said comes back with the spaces around it.
    turns = zip(demo.questions, demo.answers, reversed(demo.questions), strict=True)
    conversations = [
        [*first, {"role": "assistant", "content": f" {answer} "}, *second] for first, answer, second in turns
    ]
    cases = [(template, dialog) for dialog in [*dialogs, *conversations]]
    prompts = rendered_by_go(tmp_path, cases) if has_go() else [rendered_in_python(*case) for case in cases]
    with in_llama_cpp(demo.gguf) as model:
        tokens = [model.tokenize(prompt.encode(), add_bos=True, special=True) for prompt in prompts]
        ours = [demo.tokenizer({"messages": dialog}, inference=True)["tokens"] for _, dialog in cases]
        assert tokens == ours
        answers = [llama_cpp_answer(model, prompt, max_new_tokens=16) for prompt in tokens[: len(demo.questions)]]
    demo.assert_same_answers(map(demo.tokenizer.decode, answers))


def test_the_adapter_alone_on_the_base_answers_alike(demo, tmp_path):
    base = export(TINY_LLAMA / "checkpoint", tmp_path / "base.gguf")
    model = llama_cpp.Llama(str(base), lora_path=str(demo.lora), n_ctx=0, n_threads=1, verbose=False)
    try:
        answers = [chat_answer(model, question) for question in demo.questions[:100]]
    finally:
        model.close()
    replace(demo, questions=demo.questions[:100], answers=demo.answers[:100]).assert_same_answers(answers)


def test_added_tokens_are_recognized_and_end_answers(make_checkpoint, tmp_path):
    directory = make_checkpoint(vocab_size=1030)
    added = {"<|im_start|>": 1024, "<|im_end|>": 1025}
    (directory / "added_tokens.json").write_text(json.dumps(added))
    (directory / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": list(added)}))
    weights = BaseWeights(open_checkpoint(directory))
    transform = Llama2ChatTransform(directory / "tokenizer.model")
    write_gguf(
        tmp_path / "model.gguf",
        weights.shape,
        ((name, weights.read(name)) for name in weights.shapes),
        tokenizer=ExportedTokenizer(transform.tokenizer, (1025, 2), None),
        quantization="f16",
        name="exported",
    )
    text = "<|im_start|>user\nHello, you<|im_end|>\n"
    with in_llama_cpp(tmp_path / "model.gguf") as model:
        [(expected, _)] = transform.encode_turns([[Turn((Markup(text),), None)]])
        assert model.tokenize(text.encode(), add_bos=False, special=True) == expected
        assert expected.count(1024) == expected.count(1025) == 1
        vocabulary = llama_cpp.llama_model_get_vocab(model.model)
        ends = [token for token in range(1030) if llama_cpp.llama_vocab_is_eog(vocabulary, token)]
        assert ends == [2, 1025]
