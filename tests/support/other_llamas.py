"""Small checkpoints of models that are not Llama 2 as published: their shapes, their tokenizers and their files."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.chat_templates import CHATML_JINJA, LLAMA3_1_JINJA
from tests.support.checkpoints import as_meta_checkpoint, write_checkpoint
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
    (directory / "chat_template.jinja").write_text(CHATML_JINJA)
    return directory


def llama3_of_meta(folder: Path) -> Path:
    """params.json, consolidated.00.pth and tokenizer.model, as in Meta's own downloads."""
    directory = write_checkpoint(folder / "meta", rope_theta=500_000.0, vocab_size=640, intermediate_size=256)
    as_meta_checkpoint(directory, 1)
    write_tiktoken_file(directory / "tokenizer.model")
    params = json.loads((directory / "params.json").read_text())
    (directory / "params.json").write_text(json.dumps(params | {"rope_theta": 500_000.0, "use_scaled_rope": True}))
    return directory


@dataclass(frozen=True)
class OtherLlama:
    """A model, the setting it is trained with, and what follows from that.

    Attributes:
        template: the setting; `chosen` is the template that it means.
        stops: the tokens that end an answer.
        begins_with_bos: a prompt does.
    """

    write: Callable[[Path], Path]
    template: str
    chosen: str
    stops: list[str]
    begins_with_bos: bool = True


OTHER_LLAMAS = {
    "llama3_2": OtherLlama(llama3_2, "auto", "llama3_1", ["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"]),
    "mistral": OtherLlama(mistral, "mistral", "mistral_v3", ["</s>"]),
    "json": OtherLlama(llama2_without_model_file, "auto", "chatml", ["<|im_end|>", "</s>"], begins_with_bos=False),
    "meta": OtherLlama(llama3_of_meta, "llama3", "llama3", ["<|eot_id|>", "<|end_of_text|>"]),
    "chatml": OtherLlama(chatml_llama2, "auto", "chatml", ["<|im_end|>", "</s>"], begins_with_bos=False),
}
