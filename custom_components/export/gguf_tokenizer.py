"""A tokenizer in the words of a GGUF file.

Which keys there are and how tokens are spelled: ggml-org/llama.cpp @0c1e5709, conversion/base.py
(`_create_vocab_sentencepiece`, `_set_vocab_gpt2`, `get_vocab_base_pre`), and src/llama-vocab.cpp (`llm_tokenizer_spm`,
`llm_tokenizer_bpe`).
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import Any

from custom_components.runtime.errors import UserError
from custom_components.runtime.terminal import say
from custom_components.transforms.byte_fallback_tokenizer import ByteFallbackTokenizer
from custom_components.transforms.json_tokenizer import JsonTokenizer
from custom_components.transforms.sentencepiece_model import Piece, PieceType, read_sentencepiece_model
from custom_components.transforms.sentencepiece_tokenizer import SentencePieceTokenizer
from custom_components.transforms.tokenizer_files import ExportedTokenizer

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_ENGLISH_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPLIT = r"{endings}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's names of the ways in which a text is split into words before pieces are joined: its own code, not data of
# the file, does the splitting. Each way as `_pre_tokenizer_steps` reads it from a tokenizer.json.
_PRE_TOKENIZERS = {
    (("Split", _SPLIT.format(endings=_ENGLISH_ENDINGS, digits=r"\p{N}{1,3}")), ("ByteLevel", False)): "llama-bpe",
    (("Split", _SPLIT.format(endings=_ENGLISH_ENDINGS, digits=r"\p{N}")), ("ByteLevel", False)): "qwen2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("ByteLevel", True),): "gpt-2",
}


def add_tokenizer(writer: Any, exported: ExportedTokenizer, num_embeddings: int) -> None:
    """Add a tokenizer's pieces and types, its control tokens, and ids up to the number of embeddings.

    Raises:
        UserError: it is not one that llama.cpp can reproduce.
    """
    tokenizer = exported.tokenizer
    adds_space = None
    if isinstance(tokenizer, SentencePieceTokenizer):
        adds_space = _add_sentencepiece(writer, exported, tokenizer, num_embeddings)
    elif isinstance(tokenizer, ByteFallbackTokenizer):
        adds_space = _add_byte_fallback(writer, exported, tokenizer, num_embeddings)
    else:
        assert isinstance(tokenizer, JsonTokenizer)
        _add_byte_level(writer, exported, tokenizer, num_embeddings)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    unk = tokenizer.id_of(exported.names.get("unk_token", ""))
    if adds_space is not None and unk is not None:
        writer.add_unk_token_id(unk)
    # Beside EOS there is a place for two more tokens that end an answer: of a turn and of a message.
    [eos] = tokenizer.ids_of_pieces([exported.names["eos_token"]])
    writer.add_eos_token_id(eos)
    others = [token for token in exported.stop_tokens if token != eos]
    for add_id, token in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
        add_id(token)
    if left_out := [tokenizer.piece(token) for token in others[2:]]:
        say(f"note: a GGUF file has room for three tokens that end an answer; left out: {left_out}")
    if exported.pad_id is not None and exported.pad_id < num_embeddings:
        writer.add_pad_token_id(exported.pad_id)
    writer.add_add_bos_token(exported.begins_with_bos)
    writer.add_add_eos_token(False)
    if adds_space is not None:
        writer.add_add_space_prefix(adds_space)
    if exported.chat_template is not None:
        writer.add_chat_template(exported.chat_template)


def _add_sentencepiece(
    writer: Any, exported: ExportedTokenizer, tokenizer: SentencePieceTokenizer, num_embeddings: int
) -> bool:
    """Add a SentencePiece model's pieces with scores and types; returns whether it puts a space before every text.

    Raises:
        UserError: it is not byte-pair encoding, the only kind that llama.cpp's `llama` tokenizer computes.
    """
    model = read_sentencepiece_model(tokenizer.path)
    if not model.is_byte_pair:
        raise UserError(
            f"format: {str(tokenizer.path)!r} is no byte-pair tokenizer: llama.cpp would split texts in another way "
            "than the model was trained with; merge to another format"
        )
    if model.removes_repeated_spaces or model.replaces_characters:
        say(
            "note: this tokenizer joins repeated spaces or replaces characters before it splits a text; llama.cpp's "
            "does not, and splits such prompts in another way"
        )
    assert len(model.pieces) <= num_embeddings, f"{len(model.pieces)} pieces, {num_embeddings} embeddings"
    added = _added_pieces(exported)
    pieces = [
        *model.pieces,
        *(added.get(index, _unused(index)) for index in range(len(model.pieces), num_embeddings)),
    ]
    _add_scored_pieces(writer, pieces)
    return model.adds_leading_space


def _add_scored_pieces(writer: Any, pieces: Sequence[Piece]) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.text for piece in pieces])
    writer.add_token_scores([piece.score for piece in pieces])
    # GGUF numbers the types of tokens as SentencePiece does.
    writer.add_token_types([piece.type for piece in pieces])


def _add_byte_fallback(
    writer: Any, exported: ExportedTokenizer, tokenizer: ByteFallbackTokenizer, num_embeddings: int
) -> bool:
    """Add the pieces of a SentencePiece model's tokenizer.json; returns whether a space is put before every text.

    The scores, which the file does not have, follow from the order of its merges.

    Raises:
        UserError: the merges are not those of a SentencePiece model.
    """
    added = _added_pieces(exported)
    pieces = scored_pieces(json.loads(tokenizer.file_text)["model"], added)
    if pieces is None:
        raise UserError(
            f"format: {str(tokenizer.path)!r} joins pieces in an order that no scores of pieces give, so llama.cpp "
            "would split texts in another way; merge to another format"
        )
    if not tokenizer.begins_word_after_control_tokens and tokenizer.puts_space_before_texts:
        say(
            "note: this tokenizer puts a space before the first word of a text, but not after a control token, where "
            "llama.cpp does both or neither: it is told to put none, so a prompt that begins with text lacks it"
        )
    known = pieces | added
    _add_scored_pieces(writer, [known.get(index, _unused(index)) for index in range(num_embeddings)])
    return tokenizer.begins_word_after_control_tokens and tokenizer.puts_space_before_texts


def _add_byte_level(writer: Any, exported: ExportedTokenizer, tokenizer: JsonTokenizer, num_embeddings: int) -> None:
    """Add a byte-level tokenizer's pieces, types and merges.

    Raises:
        UserError: llama.cpp has no name for the way in which it splits texts into words, or it changes texts.
    """
    content = json.loads(tokenizer.file_text)
    steps = _pre_tokenizer_steps(content.get("pre_tokenizer") or {})
    if steps not in _PRE_TOKENIZERS or content.get("normalizer"):
        raise UserError(
            f"format: {str(tokenizer.path)!r} splits texts into words in a way that is not known here to be "
            "one of llama.cpp's; merge to another format, and convert that with llama.cpp's converter"
        )
    of_model = {index: Piece(text, 0.0, PieceType.NORMAL) for text, index in content["model"]["vocab"].items()}
    known = of_model | _added_pieces(exported)
    pieces = [known.get(index, _unused(index)) for index in range(num_embeddings)]
    # Older files have a pair as one text.
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_PRE_TOKENIZERS[steps])
    writer.add_token_list([piece.text for piece in pieces])
    writer.add_token_types([piece.type for piece in pieces])
    writer.add_token_merges(merges)


def scored_pieces(model: Mapping[str, Any], added: Collection[int]) -> dict[int, Piece] | None:
    """Give the pieces of a tokenizer.json's model the scores by which SentencePiece joins them; None: there are none.

    It joins the two neighbours whose piece has the best score, and any two whose text is a piece. So there are scores
    only where the merges have every such pair, and all pairs of one piece before those of the next.

    Args:
        model: what the file has under this key.
        added: ids that are of added tokens, which are never joined.
    """
    ids = {text: index for text, index in model["vocab"].items() if index not in added}
    types = {text: PieceType.BYTE if _BYTE.fullmatch(text) else PieceType.NORMAL for text in ids}
    if (unk := model.get("unk_token")) is not None:
        ids[unk], types[unk] = model["vocab"][unk], PieceType.UNKNOWN
    joined = {text for text, kind in types.items() if kind is PieceType.NORMAL}
    pairs = {
        (text[:end], text[end:])
        for text in joined
        for end in range(1, len(text))
        if text[:end] in joined and text[end:] in joined
    }
    # Older files have a pair as one text.
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    in_order = [text for text, _ in groupby("".join(pair) for pair in merges)]
    if set(merges) != pairs or len(set(in_order)) != len(in_order):
        return None
    ranks = {text: rank for rank, text in enumerate(in_order)}
    scores = {text: -float(ranks.get(text, len(ranks))) if text in joined else 0.0 for text in ids}
    return {index: Piece(text, scores[text], types[text]) for text, index in ids.items()}


def _added_pieces(exported: ExportedTokenizer) -> dict[int, Piece]:
    """Give the added tokens: recognized in a rendered prompt, and those that are not special also in typed text."""
    return {
        token.index: Piece(token.text, -1000.0, PieceType.CONTROL if token.is_special else PieceType.USER_DEFINED)
        for token in exported.tokenizer.added_tokens.tokens
    }


def _unused(index: int) -> Piece:
    return Piece(f"[PAD{index}]", -10_000.0, PieceType.UNUSED)  # note: llama.cpp refuses two tokens of the same text


def _pre_tokenizer_steps(node: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Read the steps of a pre_tokenizer node, each with the setting in which those of Llamas differ."""
    steps: list[tuple[str, Any]] = []
    for step in node.get("pretokenizers", [node]):
        setting = {
            "Split": lambda step: step["pattern"].get("Regex") if step.get("behavior") == "Isolated" else None,
            "Digits": lambda step: step.get("individual_digits", False),
            "ByteLevel": lambda step: step.get("use_regex", True),
        }.get(step.get("type"))
        steps.append((str(step.get("type")), setting(step) if setting else None))
    return tuple(steps)
