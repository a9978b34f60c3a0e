"""Answering prompts: decoding with a key/value cache, greedy or sampled.

Dimensions: `B` prompts, `P` tokens of the longest prompt, `L` tokens so far, `V` vocab_size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder
from torchtune.modules.common_utils import local_kv_cache

from custom_components.builders import final_hidden_states
from custom_components.errors import UserError
from custom_components.transforms import Llama2ChatTransform


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 takes the likeliest; top_k keeps only that many to draw from."""

    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0


def generate(
    model: TransformerDecoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    sampling: Sampling,
    dtype: torch.dtype,
) -> list[list[int]]:
    """The answers to prompts of any lengths, decoded together, without the stop token that ended them.

    An answer ends at a stop token, after `max_new_tokens`, or where prompt and answer fill the model's context.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    is_open = [True] * len(prompts)
    for next_tokens in decode_steps(model, prompts, max_new_tokens, sampling, dtype):
        for index, token in enumerate(next_tokens):
            is_open[index] = is_open[index] and token not in stop_tokens
            if is_open[index]:
                answers[index].append(token)
        if not any(is_open):
            break
    return answers


def answer_messages(
    model: TransformerDecoder,
    tokenizer: Llama2ChatTransform,
    dialogs: Sequence[list[dict[str, str]]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    dtype: torch.dtype,
) -> list[str]:
    """The model's answers, as text, to dialogs that end with the user's message.

    Raises:
        UserError: a dialog that fills the model's context, leaving no room for an answer.
    """
    if not dialogs:
        return []
    prompts = [tokenizer({"messages": dialog}, inference=True)["tokens"] for dialog in dialogs]
    longest = max(len(prompt) for prompt in prompts)
    if longest >= model.max_seq_len:
        raise UserError(f"prompt: {longest} tokens leave no room for an answer in a context of {model.max_seq_len}")
    was_training = model.training
    model.eval()
    answers = generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_tokens=tokenizer.stop_tokens,
        sampling=sampling,
        dtype=dtype,
    )
    model.train(was_training)
    return [tokenizer.decode(answer).strip() for answer in answers]


@torch.inference_mode()
def decode_steps(
    model: TransformerDecoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    dtype: torch.dtype,
) -> Iterator[list[int]]:
    """The next token of every prompt, step by step: one forward over the prompts, then one a token.

    Shorter prompts are padded on the left; the padding is masked, and positions count from each prompt's own start.

    Raises:
        AssertionError: for an empty prompt, or one that leaves no room in the context.
    """
    device = model.tok_embeddings.weight.device
    num_prompt_tokens = max(len(prompt) for prompt in prompts)
    num_new_tokens = min(max_new_tokens, model.max_seq_len - num_prompt_tokens)
    assert num_new_tokens > 0 and all(prompts)
    num_padding_B1 = torch.tensor([[num_prompt_tokens - len(prompt)] for prompt in prompts], device=device)
    tokens_BS = torch.tensor([[0] * (num_prompt_tokens - len(prompt)) + [*prompt] for prompt in prompts], device=device)
    columns_L = torch.arange(num_prompt_tokens + num_new_tokens, device=device)
    is_filled_BL = columns_L >= num_padding_B1
    # note: padding attends to itself, because a position that attends to nothing gives NaN.
    is_seen_PP = torch.ones(num_prompt_tokens, num_prompt_tokens, dtype=torch.bool, device=device).tril()
    diagonal_PP = torch.eye(num_prompt_tokens, dtype=torch.bool, device=device)
    mask_BSL = is_seen_PP & is_filled_BL[:, None, :num_prompt_tokens] | diagonal_PP
    positions_BS = (columns_L[:num_prompt_tokens] - num_padding_B1).clamp(min=0)
    generator = torch.Generator(device).manual_seed(sampling.seed)
    max_cache_len = num_prompt_tokens + num_new_tokens
    with local_kv_cache(model, batch_size=len(prompts), device=device, dtype=dtype, decoder_max_seq_len=max_cache_len):
        for num_tokens in range(num_prompt_tokens, max_cache_len):
            hidden_BSD = final_hidden_states(model, tokens_BS, mask_BSL, positions_BS)
            tokens_B = draw(model.output(hidden_BSD[:, -1]).float(), sampling, generator)
            yield tokens_B.tolist()
            tokens_BS = tokens_B.unsqueeze(1)
            mask_BSL = is_filled_BL[:, None, : num_tokens + 1]
            positions_BS = num_tokens - num_padding_B1


def draw(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token of each row of logits."""
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    if sampling.top_k is not None:
        kth_B1 = logits_BV.topk(min(sampling.top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    probabilities_BV = torch.softmax(logits_BV / sampling.temperature, dim=-1)
    return torch.multinomial(probabilities_BV, 1, generator=generator).squeeze(1)
