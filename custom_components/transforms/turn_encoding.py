"""Turns of text to token ids, and which of them are supervised."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from custom_components.transforms.templates import Turn
from custom_components.transforms.tokenizer import Tokenizer


class EncodedDialog(NamedTuple):
    """A dialog's ids, and for each of them whether it is trained on."""

    tokens: list[int]
    is_supervised: list[bool]


def encoded_turns(
    tokenizer: Tokenizer, turns: Sequence[Turn], marks: tuple[str, ...], *, trains_prompts: bool
) -> Iterator[EncodedDialog]:
    """Tokenize each turn as BOS + prompt + answer + EOS; positions determine what is supervised.

    Args:
        marks: added tokens that are recognized, see :meth:`Tokenizer.encode`.
        trains_prompts: prompts are supervised too, but for the masked ones.
    """
    bos_id, eos_id = tokenizer.processor.bos_id(), tokenizer.processor.eos_id()
    # The newline keeps SentencePiece from putting its dummy space before an answer that follows a text.
    joined = [bool(turn.prompt) and not turn.prompt.endswith(marks) for turn in turns]
    answers = [("\n" if join else "") + (turn.answer or "") for turn, join in zip(turns, joined, strict=True)]
    prompts_ids = tokenizer.encode([turn.prompt for turn in turns], marks)
    answers_ids = tokenizer.encode(answers, marks)
    num_newline_ids = len(tokenizer.newline_ids)
    for turn, join, prompt_ids, answer_ids in zip(turns, joined, prompts_ids, answers_ids, strict=True):
        tokens = [bos_id, *prompt_ids]
        is_supervised = [False] + [trains_prompts and not turn.is_prompt_masked] * len(prompt_ids)
        if turn.answer is not None:
            ids = [*answer_ids[num_newline_ids if join else 0 :], *([] if turn.is_continued else [eos_id])]
            tokens += ids
            is_supervised += [turn.is_supervised] * len(ids)
        yield EncodedDialog(tokens, is_supervised)
