"""`auto`: what fits is found, said, and the rows of an optimizer step stay as they were."""

import copy
import dataclasses
from functools import partial

import pytest
import torch

from custom_components.config.components import instantiate
from custom_components.config.lora_settings import LoRASettings
from custom_components.config.reading import load_settings
from custom_components.memory import fitting
from custom_components.memory.estimate import Recomputing, estimate_memory
from custom_components.memory.fitting import Fit, first_fitting, fit_to_device
from custom_components.memory.simulated_step import simulated_step
from custom_components.models import shapes
from custom_components.models.llama import lora_llama
from custom_components.models.lora import adapter_modules
from custom_components.recipe_parts.step_choices import step_choices, step_parts, step_rows
from custom_components.training.loss import LinearCrossEntropy
from tests.support.models import CPU
from tests.support.paths import PROJECT

LENGTHS = [30, 20, 10, 25] * 8


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(PROJECT)


def training_settings(*overrides):
    return load_settings(LoRASettings, ["--config", "configs/tiny_qlora.yaml", *overrides])


@pytest.fixture(scope="module")
def model():
    settings = load_settings(LoRASettings, ["--config", str(PROJECT / "configs/tiny_qlora.yaml")])
    with torch.device("meta"):
        return instantiate(settings.model | {"checkpoint_dir": PROJECT / settings.model["checkpoint_dir"]})


def fit(model, monkeypatch, usable_gib, *overrides):
    monkeypatch.setattr(fitting, "usable_bytes", lambda device: int(usable_gib * 2**30))
    settings = training_settings("gradient_accumulation_steps=6", *overrides)
    rows = step_rows(settings, LENGTHS, 256)
    return fit_to_device(step_choices(settings), model, rows, step_parts(settings), torch.bfloat16, CPU)


def test_batch_size_auto_keeps_the_rows_of_a_step(model, monkeypatch):
    auto = ("batch_size=auto", "enable_activation_checkpointing=auto")
    roomy = fit(model, monkeypatch, 100, *auto)
    assert (roomy.batch_size, roomy.gradient_accumulation_steps, roomy.recomputing) == (6, 1, Recomputing())
    settings = training_settings(*auto)
    peak_gib = {
        size: estimate_memory(model, step_parts(settings), torch.bfloat16, "cpu", [30] * size).peak_bytes(Recomputing())
        / 2**30
        for size in (1, 3, 6)
    }
    assert peak_gib[1] < peak_gib[3] < peak_gib[6]
    tight = fit(model, monkeypatch, peak_gib[3], *auto)
    assert tight.batch_size * tight.gradient_accumulation_steps == 6
    assert 3 <= tight.batch_size < 6 and tight.recomputing.num_layers == 0
    too_tight = fit(model, monkeypatch, 0.01, *auto)
    assert too_tight.batch_size == 1 and too_tight.recomputing == Recomputing(len(model.layers))
    assert "may not fit" in too_tight.words


def test_only_what_does_not_fit_is_recomputed(model, monkeypatch):
    overrides = ("batch_size=8", "packed=true", "enable_activation_checkpointing=auto")
    settings = training_settings(*overrides)
    estimate = estimate_memory(model, step_parts(settings), torch.bfloat16, "cpu", [256] * 8)
    num_layers = len(model.layers)
    peaks = [estimate.peak_bytes(Recomputing(number)) for number in range(num_layers + 1)]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > peaks[-1]
    assert fit(model, monkeypatch, 100, *overrides).recomputing.num_layers == 0
    some = fit(model, monkeypatch, (peaks[2] + 1) / 2**30, *overrides)
    assert some.recomputing.num_layers == 2 and some.batch_size == 8


def test_only_the_cpu_keeps_probabilities_of_attention(model):
    """The kernels of a card keep none: how its tokens are divided into rows is all the same to a layer."""
    step_of = partial(simulated_step, model, torch.bfloat16, loss_function=LinearCrossEntropy())
    kept_bytes = {
        (device_type, lengths): step_of(device_type, lengths).kept_layer_bytes
        for device_type in ("cpu", "cuda")
        for lengths in ((64,) * 4, (256,))
    }
    assert kept_bytes["cuda", (64,) * 4] == kept_bytes["cuda", (256,)]
    assert kept_bytes["cpu", (64,) * 4] < kept_bytes["cpu", (256,)]


def test_a_dropout_mask_has_one_byte_a_value_on_cuda(model):
    """Four inputs of a layer are dropped: of q, k and v, of the output, of gate and up, of down."""
    num_tokens, itemsize = 256, 2
    num_dropped = num_tokens * (3 * model.head_dim * model.num_heads + model.layers[0].mlp.w2.in_dim)
    for device_type, mask_itemsize in (("cpu", itemsize), ("cuda", 1)):
        kept_bytes = {}
        for dropout in (0.0, 0.1):
            changed = copy.deepcopy(model)
            for module in adapter_modules(changed).values():
                module.dropout = dropout
            step = simulated_step(changed, torch.bfloat16, device_type, (num_tokens,), LinearCrossEntropy())
            kept_bytes[dropout] = step.kept_layer_bytes
        # CUDA's attention keeps its output for its own backward, besides the dropped one.
        output_bytes = num_tokens * model.head_dim * model.num_heads * itemsize if device_type == "cuda" else 0
        assert kept_bytes[0.1] - kept_bytes[0.0] == num_dropped * mask_itemsize + output_bytes, device_type


def test_nothing_is_chosen_where_the_config_says_it_all(model, monkeypatch):
    assert fit(model, monkeypatch, 0, "batch_size=3", "enable_activation_checkpointing=true") == Fit(
        3, 6, Recomputing(4)
    )


def test_the_largest_forward():
    assert step_rows(training_settings(), LENGTHS, 256).largest_forward(3) == (30, 30, 30)
    packed = training_settings("packed=true", "max_seq_len=256")
    assert step_rows(packed, LENGTHS, 256).largest_forward(2) == (256, 256)


ALL, OFFLOADED = Recomputing(4), Recomputing(4, offloads_inputs=True)


@pytest.mark.parametrize(
    "fitting_fit",
    [Fit(8, 1), Fit(4, 2), Fit(1, 8), Fit(1, 8, ALL), Fit(1, 8, OFFLOADED)],
    ids=lambda fit: str(dataclasses.astuple(fit)),
)
def test_what_the_device_refuses_is_made_smaller(fitting_fit, monkeypatch):
    monkeypatch.setattr(fitting.gc, "collect", lambda: None)  # which looks at all that the tests have imported
    ladder = [Recomputing(number) for number in range(5)] + [OFFLOADED]

    def size(fit):
        return fit.batch_size, -ladder.index(fit.recomputing)

    def try_step(fit):
        if size(fit) > size(fitting_fit):
            raise torch.OutOfMemoryError

    assert first_fitting(Fit(8, 1), ladder, may_shrink=True, try_step=try_step) == fitting_fit
    if fitting_fit.batch_size < 8:
        with pytest.raises(torch.OutOfMemoryError):
            first_fitting(Fit(8, 1, ALL), [ALL], may_shrink=False, try_step=try_step)


def test_an_output_head_of_many_rows_counts_once():
    """As it is read, it is there beside the base; nothing packs a second copy of it for its products."""
    settings = training_settings()
    estimates = []
    for vocab_size in (1024, 128_256):
        shape = dataclasses.replace(shapes.LLAMA3_2_1B, num_layers=2, vocab_size=vocab_size, max_seq_len=64)
        with torch.device("meta"):
            wide = lora_llama(shape, ["q_proj"], quantize_base=True)
        estimates.append(estimate_memory(wide, step_parts(settings), torch.bfloat16, "cpu", [30]))
    small, large = estimates
    more_bytes = 2 * (128_256 - 1024) * 2048
    assert large.base_bytes - small.base_bytes == more_bytes
    assert large.overhead_bytes == small.overhead_bytes
    assert more_bytes - 2**27 < large.loading_bytes - small.loading_bytes <= more_bytes
