"""Rows of many tokens: the estimate is what a step takes with its layers recomputed, and their inputs elsewhere."""

import pytest
import torch

from benchmarks import long_rows
from benchmarks.gpu import random_batch
from benchmarks.long_rows import CountedInputs
from custom_components.memory.estimate import Recomputing
from custom_components.memory.report import MANY_TOKENS, MemoryLine, usable_card_bytes
from custom_components.memory.simulated_step import LiveBytes, simulated_step
from custom_components.models.llama import lora_llama
from custom_components.models.shapes import LLAMA3_1_8B, LlamaShape
from custom_components.training.gradients import ForwardOptions, accumulate_gradients, supervised_loss
from custom_components.training.loss import LinearCrossEntropy
from tests.support.models import ALL_ATTENTION, CPU

NUM_LAYERS, NUM_TOKENS = 3, 5000


def test_L31_a_long_row_takes_what_the_estimate_says():
    """More tokens than a piece; three layers, where the estimate looks at two."""
    shape = LlamaShape(256, NUM_LAYERS, 4, 2, 64, 256, NUM_TOKENS)
    lora = {"apply_lora_to_mlp": True, "lora_rank": 4, "quantize_base": True}
    with torch.device("meta"):
        on_meta = lora_llama(shape, ALL_ATTENTION, **lora)
    estimate = simulated_step(on_meta, torch.float32, "cpu", (NUM_TOKENS,), LinearCrossEntropy())
    model, inputs = lora_llama(shape, ALL_ATTENTION, **lora).train(), CountedInputs()
    batch, no_scaler = random_batch([NUM_TOKENS], shape.vocab_size), torch.amp.GradScaler("cpu", enabled=False)
    loss_of = supervised_loss(model, LinearCrossEntropy(), ForwardOptions(NUM_LAYERS, layer_inputs=inputs))
    with LiveBytes() as memory:
        accumulate_gradients([batch], loss_of, no_scaler, CPU)
    assert inputs.peak_bytes == NUM_LAYERS * estimate.layer_input_bytes == NUM_LAYERS * NUM_TOKENS * 64 * 4
    assert memory.peak_bytes == pytest.approx(estimate.peak_bytes(NUM_LAYERS, NUM_LAYERS), rel=0.1)
    # Of the inputs that wait elsewhere two are back at a time.
    elsewhere = memory.peak_bytes - (NUM_LAYERS - 2) * estimate.layer_input_bytes
    offloaded = estimate.peak_bytes(NUM_LAYERS, NUM_LAYERS, offloads_inputs=True)
    assert elsewhere == pytest.approx(offloaded, rel=0.1)
    assert offloaded < estimate.peak_bytes(NUM_LAYERS, NUM_LAYERS) < estimate.peak_bytes(NUM_LAYERS, 0) / 2


@pytest.mark.slow
@pytest.mark.parametrize("card", long_rows.PUBLISHED_TOKENS)
def test_rows_are_longer_than_published_ones(card):
    """By estimate 1.2 times those of Unsloth at least, on every card."""
    estimates = [long_rows.estimate_of(LLAMA3_1_8B, 32, number * MANY_TOKENS, "cuda") for number in (2, 4)]
    line = MemoryLine(2 * MANY_TOKENS, *estimates)
    num_tokens = line.largest_forward_tokens(usable_card_bytes(card), offloads_inputs=True)
    assert num_tokens >= 1.2 * long_rows.PUBLISHED_TOKENS[card][0]
    all_offloaded = Recomputing(LLAMA3_1_8B.num_layers, offloads_inputs=True)
    assert line.at(num_tokens).peak_bytes(all_offloaded) <= usable_card_bytes(card)
