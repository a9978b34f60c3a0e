"""Compiling is for the time of a block and leaves nothing behind."""

import importlib.machinery
import importlib.util

import pytest
import torch
from torch import nn

from custom_components.training.compiling import compiled_layers
from tests.support.models import CPU

CUDA = torch.device("cuda")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])


def are_compiled(model):
    return {layer._compiled_call_impl is not None for layer in model.layers}


@pytest.fixture
def triton(monkeypatch):
    find_spec = importlib.util.find_spec
    spec = importlib.machinery.ModuleSpec("triton", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "triton" else find_spec(name))


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("setting", "device"), [(True, CPU), ("auto", CUDA)])
def test_the_compiler_s_flag_and_the_layers_are_as_before_after_the_block(triton, setting, device, before):
    model = Model()
    with torch._dynamo.config.patch(suppress_errors=before):
        with pytest.raises(KeyError), compiled_layers(model, setting, device, num_forwards=1000):
            assert are_compiled(model) == {True}
            assert torch._dynamo.config.suppress_errors == (setting == "auto")
            raise KeyError
        assert are_compiled(model) == {False}
        assert torch._dynamo.config.suppress_errors == before


@pytest.mark.parametrize(
    ("setting", "device", "num_forwards"), [(False, CUDA, 1000), ("auto", CPU, 1000), ("auto", CUDA, 10)]
)
def test_auto_compiles_long_runs_on_a_card_only(triton, setting, device, num_forwards):
    model = Model()
    with compiled_layers(model, setting, device, num_forwards):
        assert are_compiled(model) == {False}


def test_the_wait_for_the_compiler_is_said_and_nothing_where_nothing_is_compiled(capsys):
    with compiled_layers(Model(), setting=True, device=CPU, num_forwards=1):
        assert "about a minute" in capsys.readouterr().out
    with compiled_layers(Model(), setting=False, device=CPU, num_forwards=1):
        assert capsys.readouterr().out == ""
