"""L13: which number format, and fp16 with a gradient scaler."""

import math

import pytest
import torch

from custom_components.runtime.devices import resolved_device, resolved_dtype
from custom_components.runtime.errors import UserError
from custom_components.training.optimizer import clip_gradients, update_weights
from tests.support.models import CPU
from tests.support.recipe_runs import RECIPES, tune_run
from tests.support.run_results import records

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("auto", (7, 5), torch.float16),
        ("auto", (8, 0), torch.bfloat16),
        ("auto", (8, 9), torch.bfloat16),
        ("fp16", (7, 5), torch.float16),
        ("bf16", (9, 0), torch.bfloat16),
        ("fp32", (7, 5), torch.float32),
    ],
)
def test_L13_bf16_only_where_the_card_has_it(monkeypatch, name, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dtype, words = resolved_dtype(name, CUDA)
    assert dtype is expected
    assert name != "auto" or "compute capability" in words


def test_L13_bf16_is_refused_on_a_card_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UserError, match="use dtype=fp16 or auto"):
        resolved_dtype("bf16", CUDA)


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_L13_on_the_cpu_auto_is_bf16_where_the_processor_has_it(monkeypatch, has_bf16, expected):
    monkeypatch.setattr("custom_components.runtime.devices.cpu_has_bf16", lambda: has_bf16)
    dtype, words = resolved_dtype("auto", CPU)
    assert dtype is expected and "bf16 instructions" in words


def test_auto_device_is_never_mps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolved_device("auto") == CPU


def test_L13_an_overflow_backs_the_scaler_off_and_is_counted():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.SGD([parameter], lr=1.0), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(parameter.sum() * math.inf).backward()
    grad_norm = clip_gradients(optimizer, scaler, clip_grad_norm=None)
    assert update_weights(optimizer, scaler, 1.0, grad_norm.item(), 1, [[0]])
    assert torch.equal(parameter, torch.ones(3)) and parameter.grad is None
    assert scaler.get_scale() == 4.0
    scaler.scale(parameter.sum()).backward()
    grad_norm = clip_gradients(optimizer, scaler, clip_grad_norm=None)
    assert not update_weights(optimizer, scaler, 1.0, grad_norm.item(), 2, [[0]])
    assert torch.equal(parameter, torch.zeros(3))


def test_L09_a_loss_that_is_not_finite_stops_an_fp16_run_too():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.SGD([parameter], lr=1.0), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(parameter.sum() * math.nan).backward()
    grad_norm = clip_gradients(optimizer, scaler, clip_grad_norm=None)
    with pytest.raises(UserError, match="step 4: loss nan"):
        update_weights(optimizer, scaler, math.nan, grad_norm.item(), 4, [[0]])


def test_L09_a_gradient_that_no_scale_makes_finite_stops_an_fp16_run():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.SGD([parameter], lr=1.0), torch.amp.GradScaler("cpu", init_scale=0.5)
    scaler.scale(parameter.sum() * math.inf).backward()
    grad_norm = clip_gradients(optimizer, scaler, clip_grad_norm=None)
    with pytest.raises(UserError, match="gradient norm"):
        update_weights(optimizer, scaler, 1.0, grad_norm.item(), 4, [[0]])


@pytest.mark.parametrize(
    "recipe", ["lora_single_device", pytest.param("lora_dpo_single_device", marks=pytest.mark.slow)]
)
def test_L13_the_recipe_in_fp16_learns_as_it_does_in_bf16(make_checkpoint, tmp_path, recipe):
    """A T4's path, on the CPU: 30 steps, no bf16 anywhere."""
    checkpoint, small = make_checkpoint(), RECIPES[recipe]
    rows = small.write_rows(tmp_path / "rows.jsonl", 40)
    last_losses = {}
    for dtype in ("fp16", "bf16"):
        overrides = (f"dtype={dtype}", "epochs=3", "batch_size=4", "optimizer.lr=5e-3")
        result = tune_run(*small.arguments(checkpoint, rows, tmp_path / dtype, *overrides), recipe=recipe)
        assert result.returncode == 0, result.stderr
        losses = [record["loss"] for record in records(tmp_path / dtype)]
        assert len(losses) == 30
        last_losses[dtype] = sum(losses[-10:]) / 10
        assert last_losses[dtype] < 0.8 * losses[0]
    assert last_losses["fp16"] == pytest.approx(last_losses["bf16"], rel=0.02)
