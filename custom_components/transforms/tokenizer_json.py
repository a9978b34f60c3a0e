"""tokenizer.json of a SentencePiece model: the file that transformers, vLLM and other fast tokenizers read.

transformers 5 can make one from tokenizer.model itself, but ranks the merges by id instead of by score (5.23,
convert_slow_tokenizer.py, `SentencePieceExtractor.extract`): Llama 2's pieces of several spaces, which have the lowest
score, then come first, and repeated spaces or indented code get other ids than in training.
"""

from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors

_SPACE = "\u2581"
# Text that tokenizers treat differently: repeated spaces, line breaks, characters split into bytes or replaced.
_PROBE = "  Où   est-il?\n\n\tdef f():\n        return 12.5\u00a0½ ﬁ e\u0301 漢字 🙂 internationalization "


def fast_tokenizer(tokenizer_model: Path) -> tokenizers.Tokenizer | None:
    """Build a tokenizer that gives the text between two control tokens the ids that SentencePiece gives it.

    None if that is not possible: for a model that is not a byte-pair encoding, or replaces characters.
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
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
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in (unk, bos, eos)])
    is_the_same = tokenizer.encode(_PROBE, add_special_tokens=False).ids == processor.encode(_PROBE)
    return tokenizer if is_the_same else None


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
