"""L7, L8, L37: the loss of pairs in one forward is that of each answer alone, and begins at ln 2."""

import math

import pytest
import torch
import torch.nn.functional as F

from custom_components.datasets.pair_batching import collate_pairs
from custom_components.training.gradients import ForwardOptions, accumulate_gradients
from custom_components.training.loss import LinearCrossEntropy
from custom_components.training.preference import (
    PairMeasures,
    answer_log_probabilities,
    preference_loss,
    reference_log_probabilities,
)
from custom_components.training.preference_losses import sigmoid
from tests.support.models import CPU, loaded_model, with_random_adapters
from tests.support.rows import random_rows

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
HEAD = LinearCrossEntropy(chunk_size=7)


def random_pairs(num_pairs, seed=0):
    rows = [row for row in random_rows(2 * num_pairs + 1, seed) if any(label >= 0 for label in row["labels"][1:])]
    return [{"chosen": rows[index], "rejected": rows[index + 1]} for index in range(0, 2 * num_pairs, 2)]


def with_reference(model, pairs):
    """The pairs with the model's own log-probabilities, each pair alone in its forward."""
    values = reference_log_probabilities(model, [collate_pairs([pair]) for pair in pairs], HEAD, CPU)
    return [pair | {"reference": value} for pair, value in zip(pairs, values, strict=True)]


def loss_of(model, measures=None, options=None):
    return preference_loss(model, sigmoid, HEAD, measures or PairMeasures(), options)


@pytest.fixture
def make_model(make_checkpoint):
    checkpoint = make_checkpoint()

    def make(**lora):
        return loaded_model(checkpoint, lora_alpha=8, **lora)

    return make


def test_L08_answers_in_one_forward_have_the_log_probabilities_of_each_alone(make_model):
    model, pairs = with_random_adapters(make_model()).eval(), random_pairs(4)
    together = answer_log_probabilities(model, collate_pairs(pairs), HEAD, ForwardOptions())
    for pair, values in zip(pairs, together, strict=True):
        for name, value in zip(("chosen", "rejected"), values, strict=True):
            tokens, labels = torch.tensor([pair[name]["tokens"]]), torch.tensor(pair[name]["labels"][1:])
            logits = model(tokens)[0, :-1].double()
            alone = -F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            assert value.item() == pytest.approx(alone.item(), abs=1e-4)


def test_L07_a_step_counts_pairs_however_they_are_divided_into_forwards(make_model):
    model = with_random_adapters(make_model())
    pairs = with_reference(make_model(), random_pairs(5))
    gradients = []
    for forwards in ([pairs], [pairs[:1], pairs[1:]], [[pair] for pair in pairs]):
        model.zero_grad()
        measures = PairMeasures()
        batches = [collate_pairs(some) for some in forwards]
        loss = accumulate_gradients(batches, loss_of(model, measures), NO_SCALER, CPU)
        gradients.append((loss, measures.take(), [p.grad.clone() for p in model.parameters() if p.requires_grad]))
    for loss, means, grads in gradients[1:]:
        torch.testing.assert_close(loss, gradients[0][0])
        assert means == pytest.approx(gradients[0][1], rel=1e-5, abs=1e-5)
        for grad, first in zip(grads, gradients[0][2], strict=True):
            torch.testing.assert_close(grad, first, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"quantize_base": True}])
def test_L37_the_first_loss_of_a_new_adapter_is_ln_2_with_dropout_too(make_model, variant):
    model = make_model(lora_dropout=0.5, **variant).train()
    pairs = with_reference(model, random_pairs(6))
    assert model.training
    measures = PairMeasures()
    loss = accumulate_gradients(
        [collate_pairs(pairs[:2]), collate_pairs(pairs[2:])], loss_of(model, measures), NO_SCALER, CPU
    )
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert measures.take()["reward_margin"] == pytest.approx(0, abs=1e-5)


def test_L37_after_fine_tuning_it_is_ln_2_without_dropout(make_model):
    model = with_random_adapters(make_model()).train()
    pairs = with_reference(model, random_pairs(6))
    loss = accumulate_gradients([collate_pairs(pairs)], loss_of(model), NO_SCALER, CPU)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_L14_gradients_are_those_of_autograd_through_whole_logits(make_model):
    model = with_random_adapters(make_model())
    pairs = with_reference(make_model(), random_pairs(3))
    batch = collate_pairs(pairs)
    accumulate_gradients([batch], loss_of(model), NO_SCALER, CPU)
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    rewards = []
    for pair in pairs:
        sums = []
        for name in ("chosen", "rejected"):
            tokens, labels = torch.tensor([pair[name]["tokens"]]), torch.tensor(pair[name]["labels"][1:])
            sums.append(-F.cross_entropy(model(tokens)[0, :-1], labels, ignore_index=-100, reduction="sum"))
        rewards.append(0.1 * ((sums[0] - pair["reference"][0]) - (sums[1] - pair["reference"][1])))
    (-F.logsigmoid(torch.stack(rewards)).mean()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.isfinite(ours[name]).all() and ours[name].any()
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_measures_are_means_over_all_pairs(make_model):
    model = with_random_adapters(make_model())
    pairs = with_reference(make_model(), random_pairs(5))
    measures, halves = PairMeasures(), [collate_pairs(pairs[:2]), collate_pairs(pairs[2:])]
    for half in halves:
        loss_of(model, measures)(half)
    policy = torch.cat([answer_log_probabilities(model, half, HEAD, ForwardOptions()) for half in halves])
    rewards = 0.1 * (policy - torch.tensor([pair["reference"] for pair in pairs], dtype=torch.float64))
    margins = rewards[:, 0] - rewards[:, 1]
    expected = [margins.mean(), (margins > 0).double().mean(), *policy.mean(0)]
    assert list(measures.take().values()) == pytest.approx([value.item() for value in expected])
