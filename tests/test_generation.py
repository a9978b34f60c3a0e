"""Decoding with a cache."""

import pytest
import torch

from custom_components.builders import final_hidden_states
from custom_components.errors import UserError
from custom_components.generation import Sampling, answer_messages, draw, generate
from tests.conftest import loaded_model, with_random_adapters

GREEDY = Sampling()


@pytest.fixture
def model(make_checkpoint):
    return with_random_adapters(loaded_model(make_checkpoint())).eval()


@torch.no_grad()
def answer_without_cache(model, prompt, num_tokens):
    tokens = list(prompt)
    for _ in range(num_tokens):
        positions = torch.arange(len(tokens))[None]
        hidden = final_hidden_states(model, torch.tensor([tokens]), None, positions)
        tokens.append(int(model.output(hidden[:, -1]).argmax()))
    return tokens[len(prompt) :]


def test_the_cache_changes_no_token_of_200(model):
    prompt = [1, 50, 60, 70]
    expected = answer_without_cache(model, prompt, 200)
    assert len(set(expected)) > 5, "an answer of one repeated token would show nothing"
    assert generate(model, [prompt], max_new_tokens=200, stop_tokens=[], sampling=GREEDY, dtype=torch.float32) == [
        expected
    ]


def test_a_prompt_is_answered_alike_alone_and_among_others(model):
    prompts = [[1, 50], [1, 60, 70, 80, 90, 100, 110], [1, 7, 8]]
    together = generate(model, prompts, max_new_tokens=30, stop_tokens=[], sampling=GREEDY, dtype=torch.float32)
    assert together == [answer_without_cache(model, prompt, 30) for prompt in prompts]


def test_an_answer_ends_at_a_stop_token(model):
    [whole] = generate(model, [[1, 50]], max_new_tokens=30, stop_tokens=[], sampling=GREEDY, dtype=torch.float32)
    stop = whole[7]
    [answer] = generate(model, [[1, 50]], max_new_tokens=30, stop_tokens=[stop], sampling=GREEDY, dtype=torch.float32)
    assert answer == whole[: whole.index(stop)]


def test_an_answer_ends_where_the_context_does(model):
    prompt = [1] * 250
    [answer] = generate(model, [prompt], max_new_tokens=30, stop_tokens=[], sampling=GREEDY, dtype=torch.float32)
    assert len(answer) == 6


def test_no_cache_is_left_behind(model):
    generate(model, [[1, 50]], max_new_tokens=3, stop_tokens=[], sampling=GREEDY, dtype=torch.float32)
    assert not model.caches_are_setup()


def test_a_prompt_that_fills_the_context(model, tiny_tokenizer):
    dialog = [{"role": "user", "content": "word " * 300}]
    with pytest.raises(UserError, match="leave no room for an answer in a context of 256"):
        answer_messages(model, tiny_tokenizer, [dialog], max_new_tokens=5, sampling=GREEDY, dtype=torch.float32)


def test_sampling():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(2000, 1)
    generator = torch.Generator().manual_seed(0)
    assert set(draw(logits, Sampling(temperature=0.0), generator).tolist()) == {3}
    assert set(draw(logits, Sampling(temperature=1.0, top_k=2), generator).tolist()) == {2, 3}
    drawn = draw(logits, Sampling(temperature=0.5), generator)
    frequencies = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(frequencies, torch.softmax(logits[0] / 0.5, 0), atol=0.03, rtol=0)
