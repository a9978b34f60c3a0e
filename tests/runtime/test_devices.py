"""What is asked of a CUDA device before it is used. No card is needed: torch's answers are replaced."""

import os
import subprocess
import sys

import pytest
import torch

from custom_components.runtime import devices
from custom_components.runtime.devices import resolved_device, unused_card
from custom_components.runtime.errors import UserError
from custom_components.runtime.out_of_memory import is_out_of_memory
from tests.support.models import CPU
from tests.support.paths import PROJECT


@pytest.fixture
def card(monkeypatch):
    """One card, of index 0, on which a tensor can be allocated."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.enable_cudnn_sdp(was_enabled)


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_cuda_device_has_its_index_as_its_tensors_have(card, name):
    assert resolved_device(name) == torch.device("cuda:0")


def test_cudnn_does_not_plan_attention_for_every_shape(card):
    torch.backends.cuda.enable_cudnn_sdp(True)
    resolved_device("cuda")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("text", ["CUDA error: all CUDA-capable devices are busy or unavailable", "invalid ordinal"])
def test_a_card_that_cannot_be_used_is_an_error_with_its_reason(card, monkeypatch, text):
    def zeros(*shape, device):
        raise RuntimeError(f"{text}\nCompile with TORCH_USE_CUDA_DSA to enable device-side assertions.")

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(UserError, match="device: 'cuda' cannot be used") as error:
        resolved_device("cuda")
    assert text in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("cuda_version", [None, "13.0"])
def test_a_card_that_torch_does_not_see_is_said(monkeypatch, tmp_path, capsys, cuda_version):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda_version)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver = tmp_path / "version"
    monkeypatch.setattr(devices, "_NVIDIA_DRIVER_PATHS", (driver,))
    assert resolved_device("auto") == CPU and capsys.readouterr().err == ""
    driver.touch()
    assert resolved_device("auto") == CPU
    reason = "CPU only" if cuda_version is None else "older than CUDA 13.0 needs"
    assert reason in capsys.readouterr().err
    assert resolved_device("cpu") == CPU and capsys.readouterr().err == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unused_card() is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_errors_of_cudas_libraries_count_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) == expected


@pytest.mark.parametrize(
    ("variable", "value"),
    [(None, None), ("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync"), ("PYTORCH_ALLOC_CONF", "")],
)
def test_the_allocator_s_segments_grow_unless_it_was_set_up(variable, value):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    environment = {name: text for name, text in os.environ.items() if name not in names}
    if variable is not None:
        environment[variable] = value
    code = (
        "import os, custom_components.runtime.tune_startup; "
        f"print({{name: os.environ[name] for name in {names} if name in os.environ}})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True, check=True
    )
    expected = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if variable is None else {variable: value}
    assert result.stdout == f"{expected}\n"
