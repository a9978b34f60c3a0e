"""An answer's text in pieces is the whole text, whatever the tokenizer."""

import random

import pytest

from custom_components.transforms import ChatTransform
from custom_components.transforms.text_stream import TextStream
from tests.support.paths import TINY_TOKENIZER
from tests.support.tokenizers import write_byte_level_tokenizer


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_the_pieces_joined_are_the_answer(tmp_path, kind):
    path = TINY_TOKENIZER if kind == "sentencepiece" else write_byte_level_tokenizer(tmp_path)
    transform = ChatTransform(path)
    draw = random.Random(0)
    words = ["the", "Où", "漢字", "🙂", "\n\n", "  ", "<|eot_id|>", "don't", "x" * 40]
    for _ in range(50):
        [tokens] = transform.tokenizer.encode([" ".join(draw.choices(words, k=draw.randint(1, 40)))])
        stream = TextStream(transform)
        pieces = [*map(stream.text_of, tokens), stream.rest()]
        assert "".join(pieces) == transform.decode(tokens).strip()
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
