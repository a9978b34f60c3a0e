"""torchtune's own `generate` on our model: prompts in a batch, padded or not, with its cache or without."""

import pytest
import torch
from torchtune.generation import generate
from torchtune.modules.common_utils import local_kv_cache

from tests.support.models import CPU, loaded_model, with_random_adapters

PROMPTS = torch.randint(3, 512, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(make_checkpoint):
    return with_random_adapters(loaded_model(make_checkpoint())).eval()


def answers(model, prompts, *, cached, num_tokens=6):
    if not cached:
        return generate(model, prompts, max_generated_tokens=num_tokens, top_k=1)[0]
    with local_kv_cache(model, batch_size=len(prompts), device=CPU, dtype=torch.float32, decoder_max_seq_len=32):
        return generate(model, prompts, max_generated_tokens=num_tokens, top_k=1)[0]


@pytest.mark.parametrize("num_padding", [0, 3])
@pytest.mark.parametrize("num_prompt_tokens", [1, 7])
def test_a_batch_is_answered_as_its_prompts_alone(model, num_prompt_tokens, num_padding):
    prompts = PROMPTS[:, :num_prompt_tokens]
    alone = torch.cat([answers(model, prompt, cached=False) for prompt in prompts])
    padded = torch.nn.functional.pad(prompts, (num_padding, 0))
    for cached in (False, True):
        assert torch.equal(answers(model, padded, cached=cached)[:, num_padding:], alone), cached


def test_prompts_of_different_lengths(model):
    padded = PROMPTS.clone()
    padded[0, :4], padded[1, :1] = 0, 0
    for cached in (False, True):
        batch = answers(model, padded, cached=cached)
        for row, num_padding in zip(batch, (4, 1, 0), strict=True):
            alone = answers(model, row[num_padding : len(PROMPTS[0])], cached=False)
            assert torch.equal(row[num_padding:], alone[0])
