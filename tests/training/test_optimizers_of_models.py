"""Optimizers of a model's own weights: rounding that loses nothing, and steps in the backward."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn

from custom_components.training import compiling, weights_dtype
from custom_components.training.optimizer import clip_gradients, load_optimizer_state, set_rates
from custom_components.training.optimizer_in_backward import OptimizerInBackward
from custom_components.training.weights_dtype import trained_weights_dtype
from tests.support.models import CPU

PLAIN = {"_component_": "torch.optim.AdamW", "lr": 1e-5}
STOCHASTIC = {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-5, "bf16_stochastic_round": True}
needs_compiler = pytest.mark.skipif(not compiling.has_compiler(CPU), reason="needs a C++ compiler")
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128, bias=False), nn.Tanh(), nn.Linear(128, 64, bias=False)).to(dtype)


def loss_of(model, step):
    inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).to(model[0].weight.dtype)
    return model(inputs).float().square().mean()


def whole(model):
    return [{"params": list(model.parameters()), "lr": 1e-2}]


@pytest.mark.parametrize("make", [partial(torch.optim.AdamW, weight_decay=0.1), partial(torch.optim.SGD, momentum=0.9)])
def test_steps_in_the_backward_are_the_same_steps(make):
    """Bit for bit, at rates that change, and the norm of all gradients is the same number."""
    model, other = model_of(), model_of()
    ordinary, in_backward = make(whole(model)), OptimizerInBackward(whole(other), make)
    for step in range(4):
        set_rates(ordinary, [1e-2], 1 / (step + 1))
        set_rates(in_backward, [1e-2], 1 / (step + 1))
        loss_of(model, step).backward()
        norm = clip_gradients(ordinary, NO_SCALER, None)
        ordinary.step()
        ordinary.zero_grad()
        loss_of(other, step).backward()
        assert all(parameter.grad is None for parameter in other.parameters())
        torch.testing.assert_close(in_backward.gradient_norm(), norm)
        in_backward.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def torchao_adamw(groups):
    optim = pytest.importorskip("torchao.optim")
    return optim.AdamW8bit(groups, bf16_stochastic_round=True)


@pytest.mark.parametrize(
    "stance",
    [
        "force_eager",
        pytest.param("default", id="compiled", marks=[pytest.mark.slow, needs_compiler]),
    ],
)
@pytest.mark.parametrize("in_backward", [False, True])
def test_L17_stochastic_rounding_is_seeded_by_the_step(in_backward, stance):
    """Saved after two steps and loaded elsewhere, the last two give the same bits; a seed of another step, others."""

    def optimizer_of(model):
        return OptimizerInBackward(whole(model), torchao_adamw) if in_backward else torchao_adamw(whole(model))

    def train(model, optimizer, steps, seed=0):
        for step in steps:
            torch.manual_seed(seed + step)
            set_rates(optimizer, [1e-2], 1 / (step + 1))
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()

    with torch.compiler.set_stance(stance):
        model = model_of(torch.bfloat16)
        optimizer = optimizer_of(model)
        train(model, optimizer, [0, 1])
        stored = io.BytesIO()
        torch.save(optimizer.state_dict(), stored)
        resumed, other = copy.deepcopy(model.state_dict()), copy.deepcopy(model.state_dict())
        train(model, optimizer, [2, 3])

        def gone_on(weights, seed):
            again = model_of(torch.bfloat16)
            again.load_state_dict(weights)
            optimizer = optimizer_of(again)
            stored.seek(0)
            load_optimizer_state(optimizer, torch.load(stored, weights_only=True))
            train(again, optimizer, [2, 3], seed)
            return again

        assert all(map(torch.equal, gone_on(resumed, 0).parameters(), model.parameters()))
        assert not all(map(torch.equal, gone_on(other, 100).parameters(), model.parameters()))


def moved_share(make, stance, num_steps=20):
    """The share of bf16 weights of sigma 0.02 that a steady gradient moves."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter((0.02 * torch.randn(2**14, generator=generator)).bfloat16())
    before, gradient = parameter.detach().clone(), torch.randn(2**14, generator=generator).bfloat16()
    optimizer = make([parameter], lr=2e-5, weight_decay=0.0)
    with torch.compiler.set_stance(stance):
        for _ in range(num_steps):
            parameter.grad = gradient.clone()
            optimizer.step()
    return (parameter != before).float().mean().item()


@pytest.mark.parametrize(
    "stance",
    ["force_eager", pytest.param("default", id="compiled", marks=[pytest.mark.slow, needs_compiler])],
)
def test_bf16_weights_move_where_they_are_rounded_at_random(stance):
    optim = pytest.importorskip("torchao.optim")
    stochastic = partial(optim.AdamW8bit, bf16_stochastic_round=True)
    assert moved_share(torch.optim.AdamW, stance) < 0.5 < 0.85 < moved_share(stochastic, stance)


@pytest.mark.parametrize(
    ("optimizer", "dtype", "has_compiler", "expected", "words"),
    [
        (PLAIN, torch.float32, False, torch.float32, None),
        (PLAIN, torch.bfloat16, True, torch.bfloat16, "only 15% of the weights moved"),
        (STOCHASTIC, torch.bfloat16, True, torch.bfloat16, None),
        (STOCHASTIC, torch.bfloat16, False, torch.float32, "no compiler is here"),
        (PLAIN, torch.float16, True, torch.float32, "the weights are trained in fp32"),
    ],
)
def test_the_dtype_that_weights_are_trained_in(monkeypatch, optimizer, dtype, has_compiler, expected, words):
    monkeypatch.setattr(weights_dtype, "has_compiler", lambda device: has_compiler)
    chosen, said = trained_weights_dtype(optimizer, dtype, CPU)
    assert chosen is expected
    assert said is None if words is None else words in said
    assert (optimizer is PLAIN and dtype is torch.bfloat16) == (said or "").startswith("warning: ")


def test_without_a_compiler_a_compiled_optimizer_runs_uncompiled(monkeypatch):
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    assert not compiling.has_compiler(CPU)
    model = model_of()
    optimizer = torchao_adamw(whole(model))
    with compiling.compiled_optimizer(CPU):
        loss_of(model, 0).backward()
        optimizer.step()
    assert not all(map(torch.equal, model.parameters(), model_of().parameters()))
