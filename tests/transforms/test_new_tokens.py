"""Tokens that a run adds to a tokenizer: their ids, and the files that bring them back."""

import json

import pytest
import tokenizers

from custom_components.runtime.errors import UserError
from custom_components.transforms.chat_transform import ChatTransform
from custom_components.transforms.tokenizer_files import ExportedTokenizer, tokenizer_texts
from tests.support.dialogs import messages_of
from tests.support.paths import TINY_TOKENIZER
from tests.support.tokenizers import write_byte_level_tokenizer

CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
DIALOG = messages_of([("user", "one <|im_end|> two"), ("assistant", "answer")])


@pytest.fixture(params=["SentencePiece", "SentencePiece with <pad>", "byte-level"])
def base(request, tmp_path):
    """A directory with a tokenizer that has no tokens of ChatML, and the first id that is free."""
    directory = tmp_path / "base"
    directory.mkdir()
    if request.param == "byte-level":
        write_byte_level_tokenizer(directory)
    else:
        (directory / "tokenizer.model").write_bytes(TINY_TOKENIZER.read_bytes())
    if "<pad>" in request.param:
        (directory / "added_tokens.json").write_text(json.dumps({"<pad>": 1024}))
    return directory, ChatTransform(directory).tokenizer.num_ids


def test_new_tokens_get_the_next_ids_and_come_back_from_beside_an_adapter(base, tmp_path):
    directory, first_id = base
    transform = ChatTransform(directory, prompt_template="chatml", trainable_tokens=CHATML_TOKENS)
    assert transform.trainable_ids == (first_id, first_id + 1)
    assert f"<|im_start|> is {first_id}" in transform.format_note
    tokens = transform({"messages": DIALOG})["tokens"]
    # One opens and one ends each of the two messages; that in the question is text.
    assert [tokens.count(token) for token in transform.trainable_ids] == [2, 2]
    assert transform.stop_tokens[0] == first_id + 1
    assert "im_end" in transform.decode(tokens) and transform.decode(tokens).count("im_end") == 1

    exported = ExportedTokenizer(transform.tokenizer, transform.stop_tokens, None)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name, text in tokenizer_texts(exported, 256).items():
        (adapter / name).write_text(text)
    again = ChatTransform(directory, prompt_template="chatml", adapter_dir=adapter)
    assert again({"messages": DIALOG})["tokens"] == tokens and again.stop_tokens == transform.stop_tokens
    theirs = tokenizers.Tokenizer.from_file(str(adapter / "tokenizer.json"))
    assert [theirs.token_to_id(text) for text in CHATML_TOKENS] == [first_id, first_id + 1]
    assert [theirs.id_to_token(index) for index in range(first_id)] == [
        transform.tokenizer.piece(index) for index in range(first_id)
    ]
    # The base's own files and tokenizer have not changed.
    assert ChatTransform(directory).tokenizer.id_of("<|im_start|>") is None
    with pytest.raises(UserError, match=r"'chatml' needs <\|im_start\|>"):
        ChatTransform(directory, prompt_template="chatml")


def test_what_a_tokenizer_has_is_not_added(base):
    directory, first_id = base
    eos = ChatTransform(directory).tokenizer.eos_piece
    transform = ChatTransform(directory, prompt_template="llama2", trainable_tokens=[eos])
    assert transform.trainable_ids == (transform.eos_id,) and transform.tokenizer.num_ids == first_id
    assert "new tokens" not in transform.format_note


def test_a_token_that_no_row_would_have_is_refused(base):
    directory, _ = base
    with pytest.raises(UserError, match=r"trainable_tokens: the prompt template does not name '<think>'"):
        ChatTransform(directory, trainable_tokens=["<think>"])
    own = {"user": "{content}<think>", "assistant": "{content}"}
    assert len(ChatTransform(directory, prompt_template=own, trainable_tokens=["<think>"]).trainable_ids) == 1
