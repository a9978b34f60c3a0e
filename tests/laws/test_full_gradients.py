"""L11, L14: what is trained of a whole model has every gradient, and those that transformers computes."""

import pytest
import torch

from custom_components.datasets.batching import collate
from custom_components.runtime.errors import UserError
from custom_components.training.gradients import ForwardOptions, accumulate_gradients, supervised_loss
from custom_components.training.loss import LinearCrossEntropy
from custom_components.weights.names import HUGGING_FACE_NAMES, halve_rope_rows, translated_name
from tests.support.models import CPU, whole_model
from tests.support.rows import random_rows

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def gradients_of(model, rows, num_recomputed_layers=0):
    """By Hugging Face's names, in its row order."""
    loss_of = supervised_loss(model, LinearCrossEntropy(7), ForwardOptions(num_recomputed_layers))
    loss = accumulate_gradients([collate(rows)], loss_of, NO_SCALER, CPU)
    heads = {"q_proj": model.num_heads, "k_proj": model.layers[0].attn.num_kv_heads}
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            num_heads = next((number for part, number in heads.items() if part in name), None)
            grad = parameter.grad if num_heads is None else halve_rope_rows(parameter.grad, num_heads)
            gradients[translated_name(name, HUGGING_FACE_NAMES)] = grad
    return loss, gradients


def transformers_gradients(checkpoint, rows):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    num_supervised = sum(label != -100 for row in rows for label in row["labels"][1:])
    for row in rows:
        logits = model(torch.tensor([row["tokens"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        (torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_supervised).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_recomputed_layers", [0, 2])
def test_L11_L14_every_gradient_is_that_of_transformers(make_checkpoint, tied, num_recomputed_layers):
    checkpoint, rows = make_checkpoint(tie_word_embeddings=tied), random_rows(4)
    expected = transformers_gradients(checkpoint, rows)
    _, gradients = gradients_of(whole_model(checkpoint), rows, num_recomputed_layers)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.any(), name
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize(
    ("train_only", "trained"),
    [
        (["layers.1.*", "norm"], lambda name: name.startswith("layers.1.") or name == "norm.scale"),
        (["lm_head", "*.q_proj"], lambda name: name == "output.weight" or ".q_proj." in name),
        (["model.layers.0.self_attn", "*_norm"], lambda name: name.startswith("layers.0.attn.") or "_norm." in name),
        (["embed_tokens"], lambda name: name == "tok_embeddings.weight"),
    ],
)
def test_L12_train_only_trains_what_it_names(make_checkpoint, train_only, trained):
    """Gradients are those of a model that is trained as a whole; what is not named has none."""
    checkpoint, rows = make_checkpoint(), random_rows(4)
    model, whole = whole_model(checkpoint, train_only), whole_model(checkpoint)
    (loss, _), (expected_loss, _) = gradients_of(model, rows), gradients_of(whole, rows)
    torch.testing.assert_close(loss, expected_loss)
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {
        name for name, _ in whole.named_parameters() if trained(name)
    }
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, whole.get_parameter(name).grad, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(
    ("train_only", "words"),
    [
        (["layers.1.*", "layers.7.*"], "'layers.7.*' matches no weight of the model; names are "),
        (["layer.1"], "'layer.1' matches no weight"),
        (["NORM"], "'NORM' matches no weight"),
        ([], "leaves nothing to train"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(make_checkpoint, train_only, words):
    with pytest.raises(UserError, match="train_only: ") as error:
        whole_model(make_checkpoint(), train_only)
    assert words in str(error.value)


def test_a_tied_head_is_named_by_its_embeddings(make_checkpoint):
    with pytest.raises(UserError, match="'output' .*tied to the embeddings: name tok_embeddings"):
        whole_model(make_checkpoint(tie_word_embeddings=True), ["output"])


@pytest.mark.parametrize("tied", [False, True])
def test_L13_weights_in_fp32_are_computed_with_in_16_bits(make_checkpoint, tied):
    """Their gradients are in fp32, and near those of a computation in fp32."""
    checkpoint, rows = make_checkpoint(tie_word_embeddings=tied), random_rows(4)
    model = whole_model(checkpoint, dtype=torch.bfloat16, trained_dtype=torch.float32)
    assert model.tok_embeddings(torch.tensor([[1]])).dtype == torch.bfloat16
    _, gradients = gradients_of(model, rows)
    _, expected = gradients_of(whole_model(checkpoint), rows)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() <= 0.05 * expected[name].norm(), name
