"""A GGUF file holds the model's tensors, its sizes and its tokenizer, and is whole or absent."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from torch import Tensor

from custom_components.export.gguf import write_gguf
from custom_components.models.shapes import LlamaShape
from custom_components.runtime.errors import UserError
from custom_components.transforms.tokenizer_files import ExportedTokenizer
from custom_components.transforms.tokenizer_reading import read_tokenizer
from tests.support.paths import TINY_TOKENIZER
from tests.support.tokenizers import exported_tokenizer, write_byte_fallback_tokenizer, write_tiktoken_file

gguf = pytest.importorskip("gguf")

GROUPED_HEADS = LlamaShape(1024, 2, 4, 2, 64, 96, 128, rope_base=50_000.0, norm_eps=3e-6)
TIED_AND_PADDED = LlamaShape(1088, 1, 4, 4, 64, 96, 128, tied_embeddings=True)
ROWS_THAT_ARE_NO_BLOCKS = LlamaShape(1027, 1, 4, 4, 64, 100, 128)

# GGUF's name of each of torchtune's, as ggml's docs/gguf.md ("Standardized tensor names") lists them.
MODEL_NAMES = {"tok_embeddings.weight": "token_embd", "norm.scale": "output_norm", "output.weight": "output"}
BLOCK_NAMES = {
    **{"attn.q_proj.weight": "attn_q", "attn.k_proj.weight": "attn_k", "attn.v_proj.weight": "attn_v"},
    **{"attn.output_proj.weight": "attn_output", "sa_norm.scale": "attn_norm", "mlp_norm.scale": "ffn_norm"},
    **{"mlp.w1.weight": "ffn_gate", "mlp.w2.weight": "ffn_down", "mlp.w3.weight": "ffn_up"},
}


def random_tensors(shape: LlamaShape, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dim, kv_dim = shape.embed_dim, shape.num_kv_heads * shape.head_dim
    sizes = {"tok_embeddings.weight": (shape.vocab_size, dim), "norm.scale": (dim,)}
    if not shape.tied_embeddings:
        sizes["output.weight"] = (shape.vocab_size, dim)
    for layer in range(shape.num_layers):
        prefix = f"layers.{layer}."
        sizes |= {f"{prefix}attn.{name}_proj.weight": (dim, dim) for name in ("q", "output")}
        sizes |= {f"{prefix}attn.{name}_proj.weight": (kv_dim, dim) for name in ("k", "v")}
        sizes |= {f"{prefix}mlp.{name}.weight": (shape.intermediate_dim, dim) for name in ("w1", "w3")}
        sizes |= {f"{prefix}mlp.w2.weight": (dim, shape.intermediate_dim)}
        sizes |= {f"{prefix}{name}.scale": (dim,) for name in ("sa_norm", "mlp_norm")}
    tensors = {name: torch.randn(*size, generator=generator).to(dtype) for name, size in sizes.items()}
    # A caller's arithmetic may give a tensor that does not lie row after row.
    tensors["layers.0.attn.output_proj.weight"] = tensors["layers.0.attn.output_proj.weight"].T
    return tensors


def gguf_name(tune_name: str) -> str:
    if tune_name in MODEL_NAMES:
        return f"{MODEL_NAMES[tune_name]}.weight"
    _, layer, rest = tune_name.split(".", 2)
    return f"blk.{layer}.{BLOCK_NAMES[rest]}.weight"


def written(path: Path, shape: LlamaShape, tensors: dict[str, Tensor], **changes):
    arguments = {
        **{"tokenizer": exported_tokenizer(TINY_TOKENIZER, "{{ messages }}"), "quantization": "f16"},
        **{"name": "a model", **changes},
    }
    write_gguf(path, shape, tensors.items(), **arguments)
    return gguf.GGUFReader(path)


def stored_tensors(reader) -> dict:
    return {tensor.name: tensor for tensor in reader.tensors}


def field(reader, key: str):
    return reader.get_field(key).contents()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [GROUPED_HEADS, TIED_AND_PADDED, ROWS_THAT_ARE_NO_BLOCKS])
def test_f16_holds_every_matrix_in_f16_and_every_norm_in_f32(tmp_path, shape, dtype):
    tensors = random_tensors(shape, dtype)
    stored = stored_tensors(written(tmp_path / "model.gguf", shape, tensors))
    assert set(stored) == {gguf_name(name) for name in tensors}
    for name, tensor in tensors.items():
        expected = tensor.half() if tensor.dim() == 2 else tensor.float()
        np.testing.assert_array_equal(stored[gguf_name(name)].data, expected.numpy(), err_msg=name, strict=True)
        # GGUF counts dimensions from the one whose elements lie side by side.
        assert tuple(stored[gguf_name(name)].shape) == tuple(reversed(tensor.shape))


@pytest.mark.parametrize("shape", [GROUPED_HEADS, TIED_AND_PADDED, ROWS_THAT_ARE_NO_BLOCKS])
def test_q8_0_holds_every_value_within_half_a_step_of_its_block(tmp_path, shape):
    tensors = random_tensors(shape)
    reader = written(tmp_path / "model.gguf", shape, tensors, quantization="q8_0")
    stored = stored_tensors(reader)
    assert ((tmp_path / "model.gguf").stat().st_size - reader.data_offset) % reader.alignment == 0
    for name, tensor in tensors.items():
        held = stored[gguf_name(name)]
        if tensor.dim() == 1:
            np.testing.assert_array_equal(held.data, tensor.numpy())
        elif tensor.shape[1] % 32:
            np.testing.assert_array_equal(held.data, tensor.half().numpy())
        else:
            assert held.tensor_type == gguf.GGMLQuantizationType.Q8_0
            read = torch.from_numpy(gguf.quants.dequantize(held.data, held.tensor_type)).unflatten(1, (-1, 32))
            blocks = tensor.unflatten(1, (-1, 32))
            steps = blocks.abs().amax(dim=-1, keepdim=True) / 127
            # The step itself is rounded to f16, which moves the outermost code, 127, the most.
            assert ((read - blocks).abs() <= steps * (0.5 + 127 * 2**-11) * 1.0001).all(), name


def test_tensors_may_come_in_any_order(tmp_path):
    tensors = random_tensors(GROUPED_HEADS)
    written(tmp_path / "forwards.gguf", GROUPED_HEADS, tensors)
    written(tmp_path / "backwards.gguf", GROUPED_HEADS, dict(reversed(tensors.items())))
    assert (tmp_path / "forwards.gguf").read_bytes() == (tmp_path / "backwards.gguf").read_bytes()


@pytest.mark.parametrize(("quantization", "encoding"), [("f16", "F16"), ("q8_0", "Q8_0")])
def test_rows_are_converted_in_parts_as_they_would_be_together(tmp_path, quantization, encoding):
    shape = dataclasses.replace(TIED_AND_PADDED, vocab_size=2500)  # 1024 rows are a part
    tensors = random_tensors(shape)
    reader = written(tmp_path / "model.gguf", shape, tensors, quantization=quantization)
    values = tensors["tok_embeddings.weight"].numpy()
    together = gguf.quants.quantize(values, getattr(gguf.GGMLQuantizationType, encoding))
    np.testing.assert_array_equal(stored_tensors(reader)["token_embd.weight"].data, together)


def test_metadata_is_the_shape(tmp_path):
    reader = written(tmp_path / "model.gguf", GROUPED_HEADS, random_tensors(GROUPED_HEADS), quantization="q8_0")
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "a model",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.vocab_size": 1024,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 50_000.0,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(3e-6)),
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert {key: field(reader, key) for key in expected} == expected


def test_without_a_chat_template_none_is_written(tmp_path):
    tokenizer = exported_tokenizer(TINY_TOKENIZER)
    reader = written(tmp_path / "model.gguf", GROUPED_HEADS, random_tensors(GROUPED_HEADS), tokenizer=tokenizer)
    assert reader.get_field("tokenizer.chat_template") is None


@pytest.mark.parametrize("shape", [GROUPED_HEADS, TIED_AND_PADDED])
def test_tokenizer_is_the_sentencepiece_model(tmp_path, shape):
    reader = written(tmp_path / "model.gguf", shape, random_tensors(shape))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(TINY_TOKENIZER))
    pieces = range(processor.vocab_size())
    num_padding = shape.vocab_size - len(pieces)
    tokens, scores, types = (field(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "scores", "token_type"))
    assert tokens[: len(pieces)] == [processor.id_to_piece(index) for index in pieces]
    assert scores[: len(pieces)] == [processor.get_score(index) for index in pieces]
    assert [index for index in pieces if types[index] == gguf.TokenType.CONTROL] == [1, 2]
    for token_type, is_of_type in [
        (gguf.TokenType.UNKNOWN, processor.is_unknown),
        (gguf.TokenType.CONTROL, processor.is_control),
        (gguf.TokenType.BYTE, processor.is_byte),
    ]:
        assert [types[index] == token_type for index in pieces] == [is_of_type(index) for index in pieces]
    assert types[len(pieces) :] == [gguf.TokenType.UNUSED] * num_padding
    assert len(set(tokens)) == len(tokens) == len(scores) == len(types) == shape.vocab_size
    settings = {
        **{"model": "llama", "pre": "default", "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0},
        **{"add_bos_token": True, "add_eos_token": False, "add_space_prefix": True},
    }
    assert {key: field(reader, f"tokenizer.ggml.{key}") for key in settings} == settings


SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "she sells sea shells on the sea shore",
    "how much wood would a woodchuck chuck if a woodchuck could chuck wood",
]


def trained_tokenizer(path: Path, **changes) -> Path:
    """A SentencePiece model of one's own making, byte-pair with Llama 2's normalization unless told otherwise."""
    settings = {
        **{"model_type": "bpe", "vocab_size": 295, "byte_fallback": True, "user_defined_symbols": ["<sep>"]},
        **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2},
    }
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES * 3),
            model_writer=file,
            **{**settings, **changes},
        )
    return path


def test_tokenizer_of_ones_own_making(tmp_path, capsys):
    tokenizer_model = trained_tokenizer(tmp_path / "tokenizer.model", add_dummy_prefix=False)
    tensors = random_tensors(GROUPED_HEADS)
    reader = written(tmp_path / "model.gguf", GROUPED_HEADS, tensors, tokenizer=exported_tokenizer(tokenizer_model))
    assert field(reader, "tokenizer.ggml.add_space_prefix") is False
    tokens, types = (field(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    assert types[tokens.index("<sep>")] == gguf.TokenType.USER_DEFINED
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("change", [{"remove_extra_whitespaces": True}, {"normalization_rule_name": "nmt_nfkc"}])
def test_a_tokenizer_that_llama_cpp_only_nearly_reproduces_is_said(tmp_path, capsys, change):
    tokenizer_model = trained_tokenizer(tmp_path / "tokenizer.model", **change)
    written(
        tmp_path / "model.gguf",
        GROUPED_HEADS,
        random_tensors(GROUPED_HEADS),
        tokenizer=exported_tokenizer(tokenizer_model),
    )
    assert "splits such prompts in another way" in capsys.readouterr().out


def never_asked() -> Iterator[tuple[str, Tensor]]:
    raise AssertionError("a tensor was asked for")
    yield


def refused(path: Path, tensors, match: str, **changes) -> None:
    arguments = {"tokenizer": exported_tokenizer(TINY_TOKENIZER), "quantization": "f16", "name": "a model"}
    path.write_text("what was there before")
    with pytest.raises(UserError, match=match):
        write_gguf(path, GROUPED_HEADS, tensors, **{**arguments, **changes})
    assert path.read_text() == "what was there before"
    assert [file for file in path.parent.iterdir() if file.name.startswith(".")] == []


def test_a_tokenizer_that_llama_cpp_cannot_reproduce_is_refused(tmp_path):
    tokenizer_model = trained_tokenizer(tmp_path / "tokenizer.model", model_type="unigram")
    refused(
        tmp_path / "model.gguf", never_asked(), "no byte-pair tokenizer", tokenizer=exported_tokenizer(tokenizer_model)
    )


def test_the_missing_package_is_named_with_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(tmp_path / "model.gguf", never_asked(), "pip install gguf")


@pytest.mark.parametrize("quantization, value", [("f16", 1e5), ("f16", torch.nan), ("q8_0", 1e7), ("q8_0", torch.inf)])
def test_values_beyond_f16_are_refused_by_the_name_of_their_tensor(tmp_path, quantization, value):
    tensors = random_tensors(GROUPED_HEADS)
    tensors["layers.1.mlp.w3.weight"][3, 5] = value
    refused(tmp_path / "model.gguf", tensors.items(), "layers.1.mlp.w3.weight holds", quantization=quantization)


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshapen"])
def test_tensors_of_another_model_are_never_written(tmp_path, change):
    tensors = random_tensors(TIED_AND_PADDED)
    if change == "missing":
        del tensors["norm.scale"]
    elif change == "unexpected":
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
    else:
        tensors["layers.0.mlp.w2.weight"] = tensors["layers.0.mlp.w1.weight"]
    with pytest.raises((AssertionError, KeyError)):
        written(tmp_path / "model.gguf", TIED_AND_PADDED, tensors)
    assert list(tmp_path.iterdir()) == []


def exported_json(directory: Path) -> ExportedTokenizer:
    tokenizer = read_tokenizer(directory)
    return ExportedTokenizer(tokenizer, (tokenizer.eos_id,), None)


@pytest.mark.parametrize("puts_space", ["always", "first", "never"])
def test_a_tokenizer_json_of_sentencepiece_s_kind_is_written_as_its_model(tmp_path, capsys, puts_space):
    """Scores have another scale: only their order counts."""
    directory = write_byte_fallback_tokenizer(tmp_path, puts_space)
    shape = dataclasses.replace(GROUPED_HEADS, vocab_size=1030)
    tensors = random_tensors(shape)
    of_model = written(tmp_path / "of_model.gguf", shape, tensors)
    of_json = written(tmp_path / "of_json.gguf", shape, tensors, tokenizer=exported_json(directory))
    for key in ("model", "pre", "bos_token_id", "eos_token_id", "unknown_token_id", "add_bos_token"):
        assert field(of_json, f"tokenizer.ggml.{key}") == field(of_model, f"tokenizer.ggml.{key}"), key
    assert field(of_json, "tokenizer.ggml.add_space_prefix") is (puts_space == "always")
    tokens, types, scores = (field(of_json, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "scores"))
    assert tokens[:1024] == field(of_model, "tokenizer.ggml.tokens")[:1024]
    assert tokens[1024:1027] == ["<|im_start|>", "<|im_end|>", "[PAD1026]"]
    assert types[1024:1027] == [gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.UNUSED]
    expected = field(of_model, "tokenizer.ggml.token_type")[:1024]
    expected[0] = types[0]  # <unk>: unknown in one, and a token that is added in the other
    assert types[:1024] == expected
    joined = [index for index in range(259, 1024) if len(tokens[index]) > 1]
    their_scores = field(of_model, "tokenizer.ggml.scores")
    assert sorted(joined, key=lambda index: -scores[index]) == sorted(joined, key=lambda index: -their_scores[index])
    assert ("lacks it" in capsys.readouterr().out) is (puts_space == "first")


def test_merges_that_no_scores_give_are_refused(tmp_path):
    directory = write_byte_fallback_tokenizer(tmp_path)
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    whole = content["model"]["merges"]
    for merges in (whole[:-1], [*whole[1:], whole[0], whole[1]]):
        content["model"]["merges"] = merges
        path.write_text(json.dumps(content))
        refused(
            tmp_path / "x.gguf",
            never_asked(),
            "in an order that no scores of pieces",
            tokenizer=exported_json(tmp_path),
        )


def test_metas_file_of_llama3_is_written_as_its_tokenizer_json(tmp_path):
    write_tiktoken_file(tmp_path / "tokenizer.model")
    shape = dataclasses.replace(GROUPED_HEADS, vocab_size=700)
    reader = written(tmp_path / "model.gguf", shape, random_tensors(shape), tokenizer=exported_json(tmp_path))
    assert (field(reader, "tokenizer.ggml.model"), field(reader, "tokenizer.ggml.pre")) == ("gpt2", "llama-bpe")
    tokens, types = (field(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    assert types[tokens.index("<|eot_id|>")] == gguf.TokenType.CONTROL
    assert len(field(reader, "tokenizer.ggml.merges")) > 20
