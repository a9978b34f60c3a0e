"""tokenizer.json of a SentencePiece model: the file that transformers, vLLM and other fast tokenizers read.

transformers 5 can make one from tokenizer.model itself, but ranks the merges by id instead of by score (5.23,
convert_slow_tokenizer.py, `SentencePieceExtractor.extract`): Llama 2's pieces of several spaces, which have the lowest
score, then come first, and repeated spaces or indented code get other ids than in training.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, processors

from custom_components.runtime.json_files import read_json_object
from custom_components.transforms.added_tokens import AddedToken

_SPACE = "\u2581"
# Text that tokenizers treat differently: repeated spaces, line breaks, characters split into bytes or replaced.
_PROBE = "  Où   est-il?\n\n\tdef f():\n        return 12.5\u00a0½ ﬁ e\u0301 漢字 🙂 internationalization "


def fast_tokenizer(
    processor: sentencepiece.SentencePieceProcessor, added_tokens: Sequence[AddedToken] = ()
) -> tokenizers.Tokenizer | None:
    """Build a tokenizer that gives the text between two control tokens the ids that SentencePiece gives it.

    None if that is not possible: for a model that is not a byte-pair encoding, or replaces characters.

    Args:
        added_tokens: recognized in texts like the control tokens, in the order of their ids.
    """
    ids = {processor.id_to_piece(index): index for index in range(processor.vocab_size())}
    unk, bos, eos = map(processor.id_to_piece, (processor.unk_id(), processor.bos_id(), processor.eos_id()))
    tokenizer = tokenizers.Tokenizer(
        models.BPE(ids, _merges(processor), unk_token=unk, fuse_unk=True, byte_fallback=True)
    )
    normalization = [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    if processor.encode("a  b ") == processor.encode("a b"):
        joins_spaces = [normalizers.Replace(Regex(" +"), " "), normalizers.Replace(Regex(r"\A | \z"), "")]
        normalization = joins_spaces + normalization
    tokenizer.normalizer = normalizers.Sequence(normalization)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, ids[bos])]
    )
    others = [piece for piece, index in ids.items() if processor.is_control(index) and piece not in (bos, eos)]
    control = [tokenizers.AddedToken(piece, normalized=False, special=True) for piece in (unk, bos, eos, *others)]
    tokenizer.add_special_tokens(control)
    is_the_same = tokenizer.encode(_PROBE, add_special_tokens=False).ids == processor.encode(_PROBE)
    return _with_added_tokens(tokenizer, added_tokens) if is_the_same else None


def equals_but_for_additions(path: Path, tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer.json gives all texts the ids of `tokenizer`, and has the tokens that are added to it."""
    if not path.is_file():
        return False
    theirs, ours = read_json_object(path), json.loads(tokenizer.to_str())
    parts = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    if any(theirs.get(part) != ours[part] for part in parts):
        return False
    their_model, our_model = theirs.get("model") or {}, ours["model"]
    settings = ("type", "dropout", "unk_token", "fuse_unk", "byte_fallback", "vocab")
    if any(their_model.get(setting) != our_model[setting] for setting in settings):
        return False
    added = {(token.get("id"), token.get("content")) for token in theirs.get("added_tokens", [])}
    return (
        _ranked_merges(their_model) == _ranked_merges(our_model)
        and {(token["id"], token["content"]) for token in ours["added_tokens"]} <= added
    )


def _ranked_merges(model: dict[str, Any]) -> tuple[list[str], set[tuple[str, str]]]:
    """The pieces in the order in which they are joined, and the pairs. Pairs of one piece have no order."""
    # Older files have a pair as one text.
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    return list(dict.fromkeys("".join(pair) for pair in merges)), {(left, right) for left, right in merges}


def _with_added_tokens(tokenizer: tokenizers.Tokenizer, added_tokens: Sequence[AddedToken]) -> tokenizers.Tokenizer:
    for token in added_tokens:
        # Where ids are left out, an unused name takes each: a token without one gets the next id that is free.
        for index in range(tokenizer.get_vocab_size(), token.index):
            tokenizer.add_tokens([tokenizers.AddedToken(f"[PAD{index}]", normalized=False)])
        added = tokenizers.AddedToken(token.text, special=token.is_special, **{"normalized": False, **token.flags})
        (tokenizer.add_special_tokens if token.is_special else tokenizer.add_tokens)([added])
        assert tokenizer.token_to_id(token.text) == token.index, token
    return tokenizer


def _merges(processor: sentencepiece.SentencePieceProcessor) -> list[tuple[str, str]]:
    """List the pairs of pieces that join to a piece, best score first, as SentencePiece joins them."""
    indices = [
        index
        for index in range(processor.vocab_size())
        if not (processor.is_control(index) or processor.is_unknown(index) or processor.is_byte(index))
    ]
    pieces = {processor.id_to_piece(index) for index in indices}
    indices.sort(key=lambda index: (-processor.get_score(index), index))
    return [
        (piece[:end], piece[end:])
        for piece in map(processor.id_to_piece, indices)
        for end in range(1, len(piece))
        if piece[:end] in pieces and piece[end:] in pieces
    ]
