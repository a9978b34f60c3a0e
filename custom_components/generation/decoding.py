"""Answering prompts: one forward over the prompts, then one per token.

Dimensions: `B` prompts, `P` tokens of the longest prompt, `S` new tokens, `L` tokens so far, `V` vocab_size.
"""

from collections.abc import Callable, Generator, Iterator, Sequence

import torch
from torchtune.modules import TransformerDecoder

from custom_components.generation.incremental import IncrementalLlama, KeyValueCache
from custom_components.generation.sampling import Sampling, draw
from custom_components.runtime.errors import UserError
from custom_components.transforms.chat_transform import ChatTransform, prompt_tokens
from custom_components.transforms.text_stream import TextStream


def generate(
    model: TransformerDecoder | IncrementalLlama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    sampling: Sampling,
    is_finished: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Decode the answers to prompts of any lengths together, each without the stop token that ended it.

    An answer ends at a stop token, after `max_new_tokens`, or where it and its prompt fill the model's context. It does
    not depend on the other prompts; every one draws with a generator of its own.

    Args:
        is_finished: called with an answer's tokens after each of them; True ends the answer.
    """
    if not isinstance(model, IncrementalLlama):
        model = IncrementalLlama(model)
    answers: list[list[int]] = [[] for _ in prompts]
    is_open = [True] * len(prompts)
    rooms = [model.max_seq_len - len(prompt) for prompt in prompts]
    for next_tokens in decode_steps(model, prompts, max_new_tokens, sampling):
        for index, token in enumerate(next_tokens):
            has_room = len(answers[index]) < rooms[index]
            is_open[index] = is_open[index] and has_room and token not in stop_tokens
            if is_open[index]:
                answers[index].append(token)
                is_open[index] = is_finished is None or not is_finished(answers[index])
        if not any(is_open):
            break
    return answers


def answer_messages(
    model: TransformerDecoder | IncrementalLlama,
    tokenizer: ChatTransform,
    dialogs: Sequence[Sequence[dict[str, str]]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> list[str]:
    """Answer dialogs that end with the user's message, as text.

    Raises:
        UserError: a dialog that fills the model's context, leaving no room for an answer.
    """
    if not dialogs:
        return []
    prompts = [prompt_tokens(tokenizer, dialog, model.max_seq_len) for dialog in dialogs]
    was_training = model.training
    model.eval()
    answers = generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_tokens=tokenizer.stop_tokens,
        sampling=sampling,
    )
    model.train(was_training)
    return [tokenizer.decode(answer).strip() for answer in answers]


def streamed_answer(
    model: IncrementalLlama,
    tokenizer: ChatTransform,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    cache: KeyValueCache | None = None,
    answer_tokens: list[int] | None = None,
) -> Generator[str]:
    """Yield the answer to one prompt in pieces of text, as they come; joined they are the stripped answer.

    Args:
        cache: see :func:`decode_steps`.
        answer_tokens: a list to which the answer's tokens are added as they come.
    """
    stream = TextStream(tokenizer)
    for [token] in decode_steps(model, [prompt], max_new_tokens, sampling, cache):
        if token in tokenizer.stop_tokens:
            break
        if answer_tokens is not None:
            answer_tokens.append(token)
        yield stream.text_of(token)
    yield stream.rest()


@torch.inference_mode()
def decode_steps(
    model: IncrementalLlama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    cache: KeyValueCache | None = None,
) -> Iterator[list[int]]:
    """Yield the next token of every prompt, step by step.

    Shorter prompts are padded on the left; the padding is masked, and positions count from each prompt's own start.

    Args:
        cache: of the first tokens of a single prompt, which are not read again. It is left with all but the last token
            yielded.

    Raises:
        AssertionError: for an empty prompt, or one that leaves no room in the context.
        UserError: the first logits are not finite.
    """
    device = model.device
    num_prompt_tokens = max(len(prompt) for prompt in prompts)
    num_new_tokens = min(max_new_tokens, model.max_seq_len - min(len(prompt) for prompt in prompts))
    assert num_prompt_tokens < model.max_seq_len and all(prompts)
    assert cache is None or len(prompts) == 1 and cache.num_tokens < num_prompt_tokens
    cache = cache or KeyValueCache()
    num_padding = [num_prompt_tokens - len(prompt) for prompt in prompts]
    num_padding_B1 = torch.tensor(num_padding, device=device).unsqueeze(1)
    tokens_BP = torch.tensor(
        [[0] * padding + [*prompt] for padding, prompt in zip(num_padding, prompts, strict=True)], device=device
    )
    columns_L = torch.arange(num_prompt_tokens + num_new_tokens, device=device)
    is_filled_BL = columns_L >= num_padding_B1 if any(num_padding) else None
    mask_BSL = None
    if is_filled_BL is not None:
        # note: padding attends to itself, because a position that attends to nothing gives NaN.
        is_seen_PP = torch.ones(num_prompt_tokens, num_prompt_tokens, dtype=torch.bool, device=device).tril()
        diagonal_PP = torch.eye(num_prompt_tokens, dtype=torch.bool, device=device)
        mask_BSL = is_seen_PP & is_filled_BL[:, None, :num_prompt_tokens] | diagonal_PP
    is_seen_BV = None
    if sampling.repetition_penalty != 1.0:
        is_seen_BV = torch.zeros(len(prompts), model.vocab_size, dtype=torch.bool, device=device)
        for row_V, prompt in zip(is_seen_BV, prompts, strict=True):
            row_V[torch.tensor(prompt, device=device)] = True
    generators = [torch.Generator(device).manual_seed(sampling.seed) for _ in prompts]

    tokens_BS = tokens_BP[:, cache.num_tokens :]
    positions_BS = (columns_L[cache.num_tokens : num_prompt_tokens] - num_padding_B1).clamp(min=0)
    for num_tokens in range(num_prompt_tokens, num_prompt_tokens + num_new_tokens):
        logits_BV = model(tokens_BS, cache, positions_BS, mask_BSL)
        if num_tokens == num_prompt_tokens and not logits_BV.isfinite().all():
            raise UserError(
                "dtype: the logits are not finite; weights of the checkpoint overflow in this dtype: set dtype=bf16 or "
                "fp32"
            )
        tokens_B = draw(logits_BV, is_seen_BV, sampling, generators)
        yield tokens_B.tolist()
        tokens_BS = tokens_B.unsqueeze(1)
        if is_seen_BV is not None:
            is_seen_BV.scatter_(1, tokens_BS, True)
        mask_BSL = None if is_filled_BL is None else is_filled_BL[:, None, : num_tokens + 1]
        # A longer prompt's answer may have filled the context already; what follows is ignored.
        positions_BS = (num_tokens - num_padding_B1).clamp(max=model.max_seq_len - 1)
