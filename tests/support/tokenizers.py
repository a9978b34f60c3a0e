"""Tokenizers as they go out with a model."""

from pathlib import Path

import sentencepiece

from custom_components.transforms.added_tokens import AddedTokens
from custom_components.transforms.tokenizer import Tokenizer
from custom_components.transforms.tokenizer_files import ExportedTokenizer


def exported_tokenizer(model: Path, chat_template: str | None = None) -> ExportedTokenizer:
    """A SentencePiece model and nothing else; an answer ends with its EOS."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return ExportedTokenizer(model, Tokenizer(processor, AddedTokens()), (processor.eos_id(),), chat_template)
