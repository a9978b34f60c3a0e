"""The losses of labels under every kind of output head, held against torch's own cross-entropy of whole logits."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchtune.modules import TiedLinear

from custom_components.evaluation.scores import head_scores
from custom_components.memory.simulated_step import LiveBytes
from custom_components.models import DoRALinear, LoRALinear
from custom_components.models.lora import FrozenLinear
from custom_components.models.output_head import label_losses
from custom_components.training.loss import LinearCrossEntropy

NUM_POSITIONS, DIM, VOCAB_SIZE = 11, 16, 37


def adapted(variant):
    head = variant(DIM, VOCAB_SIZE, 4, 8)
    nn.init.normal_(head.lora_b.weight)
    return head


HEADS = {
    "frozen": lambda: FrozenLinear(DIM, VOCAB_SIZE),
    "tied": lambda: TiedLinear(nn.Embedding(VOCAB_SIZE, DIM).requires_grad_(False)),
    "LoRA": lambda: adapted(LoRALinear),
    "DoRA": lambda: adapted(DoRALinear),
    "trained": lambda: nn.Linear(DIM, VOCAB_SIZE, bias=False),
    "tied and trained": lambda: TiedLinear(nn.Embedding(VOCAB_SIZE, DIM)),
}


def trained_parameters(head):
    module = head.tied_module if isinstance(head, TiedLinear) else head
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@pytest.fixture(params=HEADS)
def head(request):
    torch.manual_seed(0)
    return HEADS[request.param]()


@pytest.fixture
def positions():
    generator = torch.Generator().manual_seed(1)
    hidden_PD = torch.randn(NUM_POSITIONS, DIM, generator=generator).requires_grad_()
    return hidden_PD, torch.randint(VOCAB_SIZE, (NUM_POSITIONS,), generator=generator)


@pytest.mark.parametrize("chunk_size", [1, 4, 512])
def test_every_position_has_its_loss_and_its_gradient(head, positions, chunk_size):
    """Each with another weight, as in the loss of a preference, and summed, as in supervised fine-tuning."""
    hidden_PD, labels_P = positions
    losses_P = LinearCrossEntropy(chunk_size).position_losses(hidden_PD, head, labels_P)
    expected_P = F.cross_entropy(head(hidden_PD), labels_P, reduction="none")
    torch.testing.assert_close(losses_P, expected_P)
    inputs = [hidden_PD, *trained_parameters(head)]
    for weights_P in (torch.randn(NUM_POSITIONS), torch.ones(NUM_POSITIONS)):
        gradients = torch.autograd.grad(losses_P, inputs, weights_P, retain_graph=True)
        expected = torch.autograd.grad(expected_P, inputs, weights_P, retain_graph=True)
        torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-5)


def test_the_loss_called_as_a_function_is_the_sum(head, positions):
    hidden_PD, labels_P = positions
    loss = LinearCrossEntropy(chunk_size=4)(hidden_PD, head, labels_P)
    assert loss.shape == ()
    torch.testing.assert_close(loss, F.cross_entropy(head(hidden_PD), labels_P, reduction="sum"))
    loss.backward()
    assert hidden_PD.grad.any()


def test_evaluation_and_training_have_one_log_probability(head, positions):
    hidden_PD, labels_P = positions
    log_probabilities_P, is_likeliest_P = head_scores(hidden_PD.unsqueeze(0), head, labels_P.unsqueeze(0))
    assert torch.equal(-log_probabilities_P.float(), label_losses(hidden_PD, head, labels_P, 512))
    assert torch.equal(is_likeliest_P, head(hidden_PD).argmax(dim=1) == labels_P)


def test_no_position_is_no_loss(head):
    hidden_PD = torch.empty(0, DIM, requires_grad=True)
    loss = LinearCrossEntropy()(hidden_PD, head, torch.empty(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and hidden_PD.grad.shape == (0, DIM)


@pytest.mark.parametrize("name", ["frozen", "LoRA", "trained"])
def test_the_logits_of_all_positions_are_never_held(name):
    num_positions, vocab_size, dtype = 2048, 4096, torch.bfloat16
    with torch.device("meta"):
        make = {"frozen": FrozenLinear, "LoRA": partial(LoRALinear, rank=4, alpha=8)}
        head = make.get(name, partial(nn.Linear, bias=False))(64, vocab_size).to(dtype)
        hidden_PD = torch.empty(num_positions, 64, dtype=dtype, requires_grad=True)
        with LiveBytes() as memory:
            LinearCrossEntropy(chunk_size=128)(hidden_PD, head, torch.empty(num_positions, dtype=torch.long)).backward()
    assert memory.peak_bytes < num_positions * vocab_size * dtype.itemsize / 2


@pytest.mark.parametrize("name", ["frozen", "trained"])
def test_probabilities_of_logits_in_16_bits_are_in_fp32(name):
    """The loss of bf16 logits is that of the same logits in fp64, to seven digits and not to three."""
    torch.manual_seed(0)
    head = HEADS[name]().bfloat16()
    hidden_PD, labels_P = torch.randn(NUM_POSITIONS, DIM).bfloat16() * 4, torch.arange(NUM_POSITIONS)
    expected_P = F.cross_entropy(head(hidden_PD).double(), labels_P, reduction="none")
    losses_P = label_losses(hidden_PD, head, labels_P, 4)
    assert losses_P.dtype is torch.float32
    torch.testing.assert_close(losses_P.double(), expected_P, atol=0, rtol=1e-5)
