"""Turns to token ids, and which of them are supervised."""

import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from custom_components.transforms.tokenizer import Tokenizer
from custom_components.transforms.turns import BOS, EOS, Markup, Text, Turn


class EncodedDialog(NamedTuple):
    """A dialog's ids, and for each of them whether it is trained on."""

    tokens: list[int]
    is_supervised: list[bool]


class _Segment(NamedTuple):
    """A text between control tokens, or one of these.

    Attributes:
        is_continuation: it is encoded as the continuation of what is before it.
    """

    content: str | int
    is_supervised: bool
    is_continuation: bool = False


def encode_turns(
    tokenizer: Tokenizer, dialogs: Sequence[Sequence[Turn]], *, trains_prompts: bool
) -> list[EncodedDialog]:
    """Tokenize many dialogs at once, which is faster than one by one.

    Texts between two control tokens are encoded as one, but for the seam between a prompt and its answer: there they
    are encoded apart, as the prompt is when it waits for an answer.
    """
    split = _markup_splitter(tokenizer)
    segments_of_dialogs = [_segments(turns, split, tokenizer, trains_prompts) for turns in dialogs]
    ids = {}
    for is_continuation, encode in ((False, tokenizer.encode), (True, tokenizer.encode_continued)):
        texts = [
            segment.content
            for segments in segments_of_dialogs
            for segment in segments
            if isinstance(segment.content, str) and segment.is_continuation is is_continuation
        ]
        ids[is_continuation] = iter(encode(texts))
    encoded_dialogs = []
    for segments in segments_of_dialogs:
        encoded = EncodedDialog([], [])
        for segment in segments:
            content = segment.content
            tokens = next(ids[segment.is_continuation]) if isinstance(content, str) else [content]
            encoded.tokens.extend(tokens)
            encoded.is_supervised.extend([segment.is_supervised] * len(tokens))
        encoded_dialogs.append(encoded)
    return encoded_dialogs


def splits_a_token(tokenizer: Tokenizer, turns: Sequence[Turn]) -> bool:
    """Tell whether the border of a prompt and its answer is inside of a token that both texts together would have.

    So it is between ChatML's newline and an answer that begins with one. The token is split, in training as when the
    prompt waits for its answer.
    """
    if not tokenizer.has_pieces_of_several_words:
        return False
    segments = _segments(turns, _markup_splitter(tokenizer), tokenizer, trains_prompts=False)
    borders = [(before, after) for before, after in pairwise(segments) if after.is_continuation]
    return any(tokenizer.spans(str(before.content), str(after.content)) for before, after in borders)


def _segments(
    turns: Sequence[Turn],
    split: Callable[[Markup], Sequence[str | int]],
    tokenizer: Tokenizer,
    trains_prompts: bool,
) -> list[_Segment]:
    segments: list[_Segment] = []

    def add(text: Text, is_supervised: bool) -> None:
        run = ""
        for part in text:
            for piece in split(part) if isinstance(part, Markup) else (part,):
                if isinstance(piece, str):
                    run += piece
                else:
                    add_text(run, is_supervised)
                    segments.append(_Segment(piece, is_supervised))
                    run = ""
        add_text(run, is_supervised)

    def add_text(run: str, is_supervised: bool) -> None:
        if run:
            follows_text = bool(segments) and isinstance(segments[-1].content, str)
            is_continuation = follows_text or (bool(segments) and not tokenizer.begins_word_after_control_tokens)
            segments.append(_Segment(run, is_supervised, is_continuation))

    for turn in turns:
        start = len(segments)
        add(turn.prompt, trains_prompts and not turn.is_prompt_masked)
        if len(segments) > start and segments[start].content == tokenizer.bos_id:
            segments[start] = segments[start]._replace(is_supervised=False)  # nothing is before it to predict it from
        add(turn.answer or (), turn.is_supervised)
        add(turn.trailer, False)
    return segments


def _markup_splitter(tokenizer: Tokenizer) -> Callable[[Markup], Sequence[str | int]]:
    """Give a function that splits a template's text at the control tokens that it names: texts, and ids."""
    ids = {**tokenizer.control_ids, EOS: tokenizer.eos_id}
    if tokenizer.bos_id is not None:
        ids[BOS] = tokenizer.bos_id
    # The longest first, as other tokenizers match them.
    names = sorted({*ids, BOS}, key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, names))})")

    @cache
    def split(markup: Markup) -> Sequence[str | int]:
        parts = [part for part in pattern.split(markup) if part and (part in ids or part != BOS)]
        return [ids.get(part, part) for part in parts]

    return split
