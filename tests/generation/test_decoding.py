"""Decoding with a cache, and drawing."""

import pytest
import torch
from torch.nn.functional import linear
from torchtune.modules.common_utils import local_kv_cache
from torchtune.modules.peft import disable_adapter

from custom_components.generation import nf4_gemv
from custom_components.generation.decoding import answer_messages, decode_steps, generate, streamed_answer
from custom_components.generation.incremental import KeyValueCache, made_for_inference
from custom_components.generation.sampling import Sampling, draw, filtered_logits
from custom_components.models import nf4
from custom_components.models.hidden_states import final_hidden_states
from custom_components.runtime.errors import UserError
from custom_components.transforms.text_stream import TextStream
from tests.support.models import loaded_model, with_random_adapters

GREEDY = Sampling()


@pytest.fixture
def model(make_checkpoint):
    return with_random_adapters(loaded_model(make_checkpoint())).eval()


def answers_of(model, prompts, max_new_tokens=30, stop_tokens=(), sampling=GREEDY):
    return generate(model, prompts, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, sampling=sampling)


@torch.no_grad()
def logits_of_model(model, tokens):
    hidden = final_hidden_states(model, torch.tensor([tokens]), None, torch.arange(len(tokens))[None])
    return model.output(hidden[:, -1])[0].float()


def answer_without_cache(model, prompt, num_tokens):
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(logits_of_model(model, tokens).argmax()))
    return tokens[len(prompt) :]


@torch.inference_mode()
def logits_of_inference(model, tokens):
    return model(torch.tensor([tokens]), KeyValueCache(), torch.arange(len(tokens))[None])[0]


def test_the_cache_changes_no_token_of_200(model):
    prompt = [1, 50, 60, 70]
    expected = answer_without_cache(model, prompt, 200)
    assert len(set(expected)) > 5, "an answer of one repeated token would show nothing"
    assert answers_of(model, [prompt], 200) == [expected]
    assert answers_of(made_for_inference(model), [prompt], 200) == [expected]


@torch.no_grad()
def test_torchtunes_own_cache_changes_no_logits(model):
    """For recipes of torchtune's that decode with a builder's model."""
    tokens = torch.tensor([[1, 50, 60, 70, 80]])
    expected = model(tokens)
    device, is_seen = torch.device("cpu"), torch.ones(5, 5, dtype=torch.bool).tril()
    with local_kv_cache(model, batch_size=1, device=device, dtype=torch.float32, decoder_max_seq_len=5):
        positions = torch.arange(5)[None]
        first = model(tokens[:, :3], mask=is_seen[None, :3, :3], input_pos=positions[:, :3])
        torch.testing.assert_close(first, expected[:, :3])
        for index in (3, 4):
            mask = is_seen[None, index : index + 1, : index + 1]
            logits = model(tokens[:, index : index + 1], mask=mask, input_pos=positions[:, index : index + 1])
            torch.testing.assert_close(logits, expected[:, index : index + 1])


def test_a_prompt_is_answered_alike_alone_and_among_others(model):
    prompts = [[1, 50], [1, 60, 70, 80, 90, 100, 110], [1, 7, 8]]
    expected = [answer_without_cache(model, prompt, 30) for prompt in prompts]
    assert answers_of(model, prompts) == expected
    assert answers_of(made_for_inference(model), prompts) == expected


def test_draws_do_not_depend_on_the_other_prompts(model):
    prompts = [[1, 50], [1, 60, 70, 80, 90], [1, 7, 8]]
    sampling = Sampling(temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.3, seed=3)
    together = answers_of(model, prompts, sampling=sampling)
    assert together == [answers_of(model, [prompt], sampling=sampling)[0] for prompt in prompts]
    assert together == answers_of(model, prompts, sampling=sampling)
    assert together != answers_of(model, prompts, sampling=Sampling(temperature=1.0, seed=4))


@pytest.mark.parametrize(
    "lora", [{}, {"use_dora": True}, {"lora_attn_modules": ["q_proj"], "apply_lora_to_mlp": False}]
)
@pytest.mark.parametrize("tied", [False, True])
def test_made_for_inference_gives_the_same_logits(make_checkpoint, lora, tied):
    tokens = [1, 50, 60, 70, 80]
    model = with_random_adapters(loaded_model(make_checkpoint(tie_word_embeddings=tied), **lora)).eval()
    expected = logits_of_model(model, tokens)
    with disable_adapter(model):
        expected_base = logits_of_model(model, tokens)
    ready = made_for_inference(model)
    torch.testing.assert_close(logits_of_inference(ready, tokens), expected, atol=1e-5, rtol=1e-4)
    with disable_adapter(ready):
        torch.testing.assert_close(logits_of_inference(ready, tokens), expected_base, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected, expected_base, atol=0.01)


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"apply_lora_to_output": True}])
def test_a_folded_adapter_gives_the_same_logits(make_checkpoint, lora):
    tokens = [1, 50, 60, 70, 80]
    model = with_random_adapters(loaded_model(make_checkpoint(), **lora)).eval()
    expected = logits_of_model(model, tokens)
    folded = made_for_inference(model, fold_adapter=True)
    torch.testing.assert_close(logits_of_inference(folded, tokens), expected, atol=1e-4, rtol=1e-3)
    assert not any(
        "low_rank" in name or "lora" in name for name, _ in [*folded.named_buffers(), *folded.named_parameters()]
    )


def test_an_adapter_cannot_be_folded_into_nf4(make_checkpoint):
    with pytest.raises(UserError, match="fold_adapter: true needs an unquantized base"):
        made_for_inference(loaded_model(make_checkpoint(), quantize_base=True), fold_adapter=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_made_for_inference_gives_the_same_logits(make_checkpoint, dtype):
    tokens = [1, 50, 60, 70, 80]
    model = with_random_adapters(loaded_model(make_checkpoint(), dtype, quantize_base=True)).eval()
    expected = logits_of_model(model, tokens)
    logits = logits_of_inference(made_for_inference(model), tokens)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05 * float(expected.abs().max())
    torch.testing.assert_close(logits, expected, atol=tolerance, rtol=1e-4)


def test_packing_4_bit_codes_keeps_them():
    codes = torch.randint(0, 256, (96, 40), dtype=torch.uint8)
    assert torch.equal(nf4_gemv.unpacked(nf4_gemv.packed(codes)), codes)
    assert not torch.equal(nf4_gemv.packed(codes).flatten(), codes.flatten())


@pytest.mark.parametrize("num_rows", [1, 3, 300])
def test_4_bit_product_is_that_of_the_dequantized_weight(num_rows):
    weights = [nf4.quantize(torch.randn(out_dim, 192), torch.bfloat16) for out_dim in (64, 32)]
    if not nf4_gemv.can_multiply(weights, torch.bfloat16):
        pytest.skip("this processor or bitsandbytes has no 4-bit product on the CPU")
    input = torch.randn(num_rows, 192).bfloat16()
    expected = linear(input.float(), torch.cat([nf4.dequantize(weight, torch.float32) for weight in weights]))
    output = nf4_gemv.NF4GemvLinear(weights, torch.bfloat16)(input).float()
    torch.testing.assert_close(output, expected, atol=0.01 * float(expected.abs().max()), rtol=0.01)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_4_bit_products_are_tried_and_take_whole_blocks_only(monkeypatch, device):
    class Weight:
        def __init__(self, *shape):
            self.shape, self.device = shape, torch.device(device)

    tried = []
    monkeypatch.setattr(nf4, "is_quantized", lambda weight: True)
    monkeypatch.setattr(nf4_gemv, "gemv_works", lambda *what: tried.append(what) or False)
    assert not nf4_gemv.can_multiply([Weight(64, 128)], torch.bfloat16)
    assert tried == [(device, torch.bfloat16)]
    monkeypatch.setattr(nf4_gemv, "gemv_works", lambda *what: True)
    assert nf4_gemv.can_multiply([Weight(64, 128)], torch.bfloat16)
    assert not nf4_gemv.can_multiply([Weight(64, 128), Weight(64, 96)], torch.bfloat16)


def test_an_answer_ends_at_a_stop_token(model):
    [whole] = answers_of(model, [[1, 50]])
    stop = whole[7]
    assert answers_of(model, [[1, 50]], stop_tokens=[stop]) == [whole[: whole.index(stop)]]


def test_an_answer_ends_where_it_is_said_to_be_finished(model):
    prompts = [[1, 50, 60], [1, 70]]
    whole = answers_of(model, prompts, 12)
    finished = generate(
        model, prompts, max_new_tokens=12, stop_tokens=(), sampling=GREEDY, is_finished=lambda ids: len(ids) == 5
    )
    assert finished == [answer[:5] for answer in whole]


def test_decoding_takes_attention_s_output_in_any_memory_layout(model, monkeypatch):
    """Some CUDA kernels return it with heads behind positions."""
    attend = torch.nn.functional.scaled_dot_product_attention

    def attend_with_heads_behind(*arguments, **options):
        return attend(*arguments, **options).transpose(1, 2).contiguous().transpose(1, 2)

    expected = answers_of(model, [[1, 50, 60]], 5)
    monkeypatch.setattr(
        "custom_components.generation.incremental.F.scaled_dot_product_attention", attend_with_heads_behind
    )
    assert answers_of(model, [[1, 50, 60]], 5) == expected


def test_an_answer_ends_where_its_own_context_does(model):
    prompts = [[1] * 250, [1, 50], [1] * 255]
    answers = answers_of(model, prompts)
    assert [len(answer) for answer in answers] == [6, 30, 1]
    assert answers == [answers_of(model, [prompt])[0] for prompt in prompts]


@pytest.mark.parametrize("num_kept", [3, 10])
def test_a_cache_goes_on_from_where_it_is_set_back_to(model, num_kept):
    """What a conversation does: its next prompt begins with tokens that are in the cache."""
    ready, cache, prompt = made_for_inference(model), KeyValueCache(), [1, 50, 60, 70]
    read = prompt + [token for [token] in decode_steps(ready, [prompt], 12, GREEDY, cache)]
    assert cache.num_tokens == len(read) - 1
    cache.num_tokens = num_kept
    next_prompt = [*read[:num_kept], 90, 91, 92]
    answer = [token for [token] in decode_steps(ready, [next_prompt], 12, GREEDY, cache)]
    assert [answer] == answers_of(ready, [next_prompt], 12)


def test_a_prompt_that_fills_the_context(model, tiny_tokenizer):
    dialog = [{"role": "user", "content": "word " * 300}]
    with pytest.raises(UserError, match="leave no room for an answer in a context of 256"):
        answer_messages(model, tiny_tokenizer, [dialog], max_new_tokens=5, sampling=GREEDY)


def test_drawing():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(2000, 1)
    generator = torch.Generator().manual_seed(0)

    def drawn(sampling):
        return draw(logits, None, sampling, [generator] * len(logits))

    assert set(drawn(Sampling(temperature=0.0)).tolist()) == {3}
    assert set(drawn(Sampling(temperature=1.0, top_k=2)).tolist()) == {2, 3}
    frequencies = torch.bincount(drawn(Sampling(temperature=0.5)), minlength=4) / len(logits)
    torch.testing.assert_close(frequencies, torch.softmax(logits[0] / 0.5, 0), atol=0.03, rtol=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("top_k", "top_p", "repetition_penalty"), [(5, None, 1.0), (None, 0.7, 1.0), (None, None, 1.4), (20, 0.5, 0.8)]
)
def test_filtering_is_that_of_transformers(top_k, top_p, repetition_penalty, seed):
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 100, generator=generator) * 3
    tokens = torch.randint(0, 100, (3, 12), generator=generator)
    processors = transformers.LogitsProcessorList()
    if repetition_penalty != 1.0:
        processors.append(transformers.RepetitionPenaltyLogitsProcessor(repetition_penalty))
    processors.append(transformers.TemperatureLogitsWarper(0.7))
    if top_k is not None:
        processors.append(transformers.TopKLogitsWarper(top_k))
    if top_p is not None:
        processors.append(transformers.TopPLogitsWarper(top_p))
    is_seen = torch.zeros(3, 100, dtype=torch.bool).scatter_(1, tokens, True)
    filtered = filtered_logits(logits, is_seen, Sampling(0.7, top_k, top_p, repetition_penalty))
    torch.testing.assert_close(filtered, processors(tokens, logits))


def test_repetition_penalty_counts_prompt_and_answer(model):
    prompt, penalty = [1, 50, 60, 70], 0.8

    def expected(num_tokens_without_penalty):
        tokens = list(prompt)
        for _ in range(30):
            logits = logits_of_model(model, tokens)
            seen = torch.tensor(sorted(set(tokens[: len(tokens) - num_tokens_without_penalty(tokens)])))
            logits[seen] = torch.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
            tokens.append(int(logits.argmax()))
        return tokens[len(prompt) :]

    answer = expected(lambda tokens: 0)
    assert answer != expected(lambda tokens: len(tokens) - len(prompt)), "the answer's own tokens change nothing"
    assert answers_of(model, [prompt], 30, sampling=Sampling(repetition_penalty=penalty)) == [answer]


@pytest.mark.parametrize("seed", range(20))
def test_streamed_text_is_the_whole_text(tiny_tokenizer, seed):
    """Random tokens, many of them bytes: whole characters, halves of them, spaces at both ends, BOS between words."""
    generator = torch.Generator().manual_seed(seed)
    emoji = tiny_tokenizer.encode("🦙 née", add_bos=False, add_eos=False)
    tokens = torch.randint(3, tiny_tokenizer.vocab_size, (70,), generator=generator).tolist()
    tokens[20:20] = emoji
    tokens[seed % 4 :: 4] = [tiny_tokenizer.bos_id] * len(tokens[seed % 4 :: 4])
    tokens += emoji[:3] if seed % 2 else tiny_tokenizer.encode("end  ", add_bos=False, add_eos=False)
    stream = TextStream(tiny_tokenizer)
    pieces = [*map(stream.text_of, tokens), stream.rest()]
    assert "".join(pieces) == tiny_tokenizer.decode(tokens).strip()


def test_no_half_character_is_shown(tiny_tokenizer):
    text = "A 🦙 🎈é."
    tokens = tiny_tokenizer.encode(text, add_bos=False, add_eos=False)
    stream = TextStream(tiny_tokenizer)
    pieces = [*map(stream.text_of, tokens), stream.rest()]
    assert len(tokens) > len(text), "no character came in bytes, which would show nothing"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) == text


def test_a_streamed_answer_is_the_answer(model, tiny_tokenizer):
    dialog = [{"role": "user", "content": "Who?"}]
    [expected] = answer_messages(model, tiny_tokenizer, [dialog], max_new_tokens=40, sampling=GREEDY)
    prompt = tiny_tokenizer({"messages": dialog}, inference=True)["tokens"]
    ready = made_for_inference(model)
    assert "".join(streamed_answer(ready, tiny_tokenizer, prompt, 40, GREEDY)) == expected != ""
