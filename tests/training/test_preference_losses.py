"""The losses of pairs: each against its paper's formula, written anew, and against TRL's where TRL has it."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from custom_components.training import preference_losses
from custom_components.training.preference_losses import AnswerLogProbabilities, needs_reference

LOSSES = ["sigmoid", "rpo", "cdpo", "robust", "ipo", "simpo", "orpo"]
log_probabilities = st.floats(-400, -0.5)


def answers(policy, reference, num_tokens, requires_grad=False):
    values = torch.tensor(policy, dtype=torch.float64, requires_grad=requires_grad)
    return AnswerLogProbabilities(values, torch.tensor(reference, dtype=torch.float64), torch.tensor(num_tokens))


def some_answers():
    generator = torch.Generator().manual_seed(0)
    policy = (-60 * torch.rand(7, 2, generator=generator) - 1).tolist()
    reference = (-60 * torch.rand(7, 2, generator=generator) - 1).tolist()
    return answers(policy, reference, torch.randint(1, 40, (7, 2), generator=generator).tolist(), requires_grad=True)


def sigma(value):
    return 1 / (1 + math.exp(-value))


def by_paper(name, policy, reference, num_tokens):
    """One pair's loss at the components' defaults, from the papers, in plain floats."""
    beta, epsilon = 0.1, 0.1
    ratios = [p - r for p, r in zip(policy, reference, strict=True)]
    averages = [p / n for p, n in zip(policy, num_tokens, strict=True)]
    p_right = sigma(beta * (ratios[0] - ratios[1]))
    right, flipped = -math.log(p_right), -math.log(1 - p_right)
    if name == "sigmoid":
        return right
    if name == "rpo":
        return right - averages[0]
    if name == "cdpo":
        return (1 - epsilon) * right + epsilon * flipped
    if name == "robust":
        return ((1 - epsilon) * right - epsilon * flipped) / (1 - 2 * epsilon)
    if name == "ipo":
        return (ratios[0] / num_tokens[0] - ratios[1] / num_tokens[1] - 1 / (2 * beta)) ** 2
    if name == "simpo":
        return -math.log(sigma(2.0 * averages[0] - 2.0 * averages[1] - 1.0))
    odds = [math.exp(a) / (1 - math.exp(a)) for a in averages]
    return -averages[0] - beta * math.log(sigma(math.log(odds[0] / odds[1])))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_their_papers(name):
    given_answers = some_answers()
    losses = getattr(preference_losses, name)(given_answers).losses_N
    rows = [values.tolist() for values in given_answers]
    expected = [by_paper(name, *row) for row in zip(*rows, strict=True)]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def trl_formula(name, policy_N2, reference_N2, num_tokens_N2, beta, label_smoothing):
    """`DPOTrainer._compute_loss` of trl 1.16, its lines for one loss type."""
    chosen_scores, rejected_scores = (policy_N2 - reference_N2).unbind(1)
    delta_score = chosen_scores - rejected_scores
    if name == "sigmoid":
        return -F.logsigmoid(beta * delta_score)
    if name == "rpo":  # loss_type ["sigmoid", "sft"]; of equal lengths, because it averages over all pairs' tokens
        return -F.logsigmoid(beta * delta_score) - policy_N2[:, 0] / num_tokens_N2[:, 0]
    if name == "robust":
        clean = -(1 - label_smoothing) * F.logsigmoid(beta * delta_score)
        flipped = -label_smoothing * F.logsigmoid(-beta * delta_score)
        return (clean - flipped) / (1 - 2 * label_smoothing)
    average = chosen_scores / num_tokens_N2[:, 0] - rejected_scores / num_tokens_N2[:, 1]
    return (average - 1 / (2 * beta)) ** 2


@pytest.mark.parametrize("name", ["sigmoid", "rpo", "ipo", "robust"])
def test_L37_loss_and_gradients_equal_trls_on_the_same_log_probabilities(name):
    smoothing = {"label_smoothing": 0.2} if name == "robust" else {}
    ours, theirs = some_answers(), some_answers()
    losses = getattr(preference_losses, name)(ours, beta=0.3, **smoothing).losses_N
    expected = trl_formula(name, *theirs, 0.3, smoothing.get("label_smoothing", 0.0))
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-6)
    losses.mean().backward()
    expected.mean().backward()
    torch.testing.assert_close(ours.policy_N2.grad, theirs.policy_N2.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "cdpo", "robust"])
def test_L37_a_policy_that_is_its_reference_has_the_loss_ln_2(name):
    same = answers([[-5.0, -9.0]], [[-5.0, -9.0]], [[3, 4]])
    losses, rewards = getattr(preference_losses, name)(same)
    assert losses.item() == pytest.approx(math.log(2), abs=1e-12) and not rewards.any()


@pytest.mark.parametrize("name", LOSSES)
@given(chosen=log_probabilities, rejected=log_probabilities, num_chosen=st.integers(1, 300))
def test_a_likelier_chosen_answer_has_a_lower_loss_and_a_larger_margin(name, chosen, rejected, num_chosen):
    function = getattr(preference_losses, name)
    less = answers([[chosen - 0.25, rejected]], [[chosen, rejected]], [[num_chosen, 40]])
    more = answers([[chosen, rejected]], [[chosen, rejected]], [[num_chosen, 40]])
    (low, low_rewards), (high, high_rewards) = function(more), function(less)
    assert torch.isfinite(low).all() and low < high
    assert low_rewards[0, 0] > high_rewards[0, 0] and low_rewards[0, 1] == high_rewards[0, 1]


def test_which_losses_need_a_reference():
    path = "custom_components.training.preference_losses."
    assert [name for name in LOSSES if not needs_reference(path + name)] == ["simpo", "orpo"]
    assert needs_reference("my_package.simpo")
