"""A step's gradients, whatever a recipe's loss is."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torchtune.modules import TiedLinear
from torchtune.modules.peft import disable_adapter

from custom_components.datasets.batching import collate
from custom_components.models.llama import llama
from custom_components.models.nf4 import stored_tensors
from custom_components.models.shapes import LlamaShape
from custom_components.training.gradients import ForwardOptions, accumulate_gradients, supervised_loss, validation_loss
from custom_components.training.loss import LinearCrossEntropy
from tests.support.models import CPU, loaded_model, with_random_adapters
from tests.support.rows import random_rows

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def trained_linear(place):
    if place.tied_to is not None:
        return TiedLinear(place.tied_to)
    return nn.Linear(place.in_dim, place.out_dim, bias=False)


@dataclass
class Pairs:
    """A batch whose unit is not a token."""

    differences: Tensor

    @property
    def num_units(self):
        return len(self.differences)

    def to(self, device):
        return Pairs(self.differences.to(device))


def test_L07_a_step_is_the_sum_of_any_loss_over_the_number_of_its_units():
    weight = nn.Parameter(torch.tensor(0.5))
    differences = torch.tensor([1.0, -2.0, 3.0, 0.5, 4.0])

    def loss_of(pairs):
        return -nn.functional.logsigmoid(weight * pairs.differences).sum()

    expected = loss_of(Pairs(differences)) / 5
    [expected_gradient] = torch.autograd.grad(expected, weight)
    for sizes in ([5], [1, 4], [2, 2, 1]):
        weight.grad = None
        batches = [Pairs(part) for part in differences.split(sizes)]
        torch.testing.assert_close(accumulate_gradients(batches, loss_of, NO_SCALER, CPU), expected.detach())
        torch.testing.assert_close(weight.grad, expected_gradient)
        torch.testing.assert_close(validation_loss(nn.Module(), batches, loss_of, CPU), expected.item())


def test_L07_the_sum_is_divided_before_the_backward():
    """In fp16 the gradient of the undivided sum would overflow."""
    weight = nn.Parameter(torch.tensor(1.0, dtype=torch.float16))
    batches = [Pairs(torch.full((100,), 1000.0)) for _ in range(2)]
    accumulate_gradients(batches, lambda pairs: (weight * pairs.differences).sum(), NO_SCALER, CPU)
    torch.testing.assert_close(weight.grad.item(), 1000.0)


def test_validation_drops_nothing_and_adds_no_noise(make_checkpoint):
    """With the loss of the training step itself, dropout and NEFTune included."""
    model = with_random_adapters(loaded_model(make_checkpoint(), lora_dropout=0.5)).train()
    batches = [collate([row]) for row in random_rows(4)]
    loss_of = supervised_loss(
        model, LinearCrossEntropy(), ForwardOptions(num_recomputed_layers=1, neftune_noise_alpha=50.0)
    )
    losses = {validation_loss(model, batches, loss_of, CPU) for _ in range(3)}
    assert len(losses) == 1 and model.training
    plain = supervised_loss(model, LinearCrossEntropy())
    assert losses == {validation_loss(model, batches, plain, CPU)}
    model.eval()
    expected = sum(plain(batch).item() for batch in batches) / sum(batch.num_units for batch in batches)
    assert losses.pop() == pytest.approx(expected, rel=1e-6)


def test_what_a_forward_draws_does_not_depend_on_those_before_it(make_checkpoint):
    """So two processes that share the forwards of a step drop out what one process does, in whichever order."""
    model = with_random_adapters(loaded_model(make_checkpoint(), lora_dropout=0.5)).train()
    batches = [collate([row]) for row in random_rows(3)]
    loss_of = supervised_loss(model, LinearCrossEntropy(), ForwardOptions(neftune_noise_alpha=5.0))
    num_units = sum(batch.num_units for batch in batches)

    def gradients(*forwards):
        model.zero_grad()
        chosen, seeds = [batches[index] for index in forwards], [(7, 8, 9)[index] for index in forwards]
        loss = accumulate_gradients(chosen, loss_of, NO_SCALER, CPU, seeds, num_units)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [loss, *(parameter.grad.clone() for parameter in trained)]

    torch.testing.assert_close(gradients(0, 1, 2), gradients(2, 0, 1))
    shares = [one + other for one, other in zip(gradients(0, 2), gradients(1), strict=True)]
    torch.testing.assert_close(gradients(0, 1, 2), shares)


def test_the_adapter_switched_off_is_a_reference_for_any_loss(make_checkpoint):
    """Per row, as a preference needs it: policy and reference are one model, and equal as long as B is zero."""
    model = loaded_model(make_checkpoint())
    batch = collate(random_rows(2))
    loss_of = supervised_loss(model, LinearCrossEntropy())
    with disable_adapter(model), torch.no_grad():
        reference = loss_of(batch)
    assert loss_of(batch).item() == reference.item()


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_whose_layers_are_trained_has_every_gradient(tied):
    """What full fine-tuning needs of the builder and the loss; held against torch's own forward and cross-entropy."""
    torch.manual_seed(0)
    shape = LlamaShape(1024, 2, 4, 2, 32, 48, 64, tied_embeddings=tied)
    model = llama(shape, trained_linear).train()
    rows = random_rows(3)
    batch = collate(rows)
    loss = accumulate_gradients([batch], supervised_loss(model, LinearCrossEntropy(7)), NO_SCALER, CPU)
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected = torch.zeros(())
    for row in rows:
        logits = model(torch.tensor([row["tokens"]]))[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        expected = expected + nn.functional.cross_entropy(logits, labels, reduction="sum") / batch.num_units
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, parameter in model.named_parameters():
        assert gradients[name].any(), name
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_a_step_makes_no_tensor_of_python_numbers(make_checkpoint, monkeypatch):
    """On a card each of them waits for all that it is doing: one in each 4-bit product would be 445 in a step of 7B."""
    model = loaded_model(make_checkpoint(), quantize_base=True)
    batch = collate(random_rows(2))
    loss_of = supervised_loss(model, LinearCrossEntropy(), ForwardOptions(num_recomputed_layers=1))
    accumulate_gradients([batch], loss_of, NO_SCALER, CPU)
    weight = model.layers[0].attn.q_proj.weight

    def tensor(*args, **options):
        raise AssertionError(f"torch.tensor{args}")

    monkeypatch.setattr(torch, "tensor", tensor)
    accumulate_gradients([batch], loss_of, NO_SCALER, CPU)
    # A compiled step's product puts the weight together from its tensors.
    torch.ops.llama_lora_recipes.nf4_product(
        torch.ones(1, weight.shape[1]), stored_tensors(weight), weight.shape, False
    )
