"""Answers to a config's `sample_prompts`: before, during and after training."""

from collections.abc import Sequence

import torch
from torchtune.modules import TransformerDecoder

from custom_components.generation.decoding import Sampling, answer_messages
from custom_components.runtime.terminal import say
from custom_components.transforms.chat_transform import ChatTransform

_MAX_NEW_TOKENS = 200


def answer_sample_prompts(model: TransformerDecoder, tokenizer: ChatTransform, prompts: Sequence[str]) -> list[str]:
    """Give the model's likeliest answers, of at most 200 tokens."""
    dialogs = [[{"role": "user", "content": prompt}] for prompt in prompts]
    # note: layers compiled for training would be compiled once more for every length of an answer.
    with torch.compiler.set_stance("force_eager"):
        return answer_messages(model, tokenizer, dialogs, max_new_tokens=_MAX_NEW_TOKENS, sampling=Sampling())


def show_answers(prompts: Sequence[str], answers_before: Sequence[str], answers_after: Sequence[str]) -> None:
    """Print what the model answered before and after, prompt by prompt."""
    for prompt, before, after in zip(prompts, answers_before, answers_after, strict=True):
        say(f"\nprompt  {prompt}\nbefore  {before}\nafter   {after}")
