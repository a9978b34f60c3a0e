"""The device and the number format of a run."""

import os
from collections.abc import Mapping

import torch
from torchtune.training.precision import PRECISION_STR_TO_DTYPE

from custom_components.runtime.errors import UserError

NUM_LOADING_THREADS = min(4, os.cpu_count() or 1)

# bf16 in hardware from compute capability 8.0 (Ampere) on: CUDA C++ Programming Guide, table of compute capabilities.
BF16_COMPUTE_CAPABILITY = (8, 0)


def resolved_device(name: str) -> torch.device:
    """Choose the device that a `device` key names; "auto" is CUDA if there is a card, else the CPU (NF4 fails on mps).

    Raises:
        UserError: the CUDA device does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device: {name!r} is not there ({torch.cuda.device_count()} CUDA devices found); use device=auto"
        )
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # torchtune's offloading brings activations back to the current one
    return device


def resolved_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Choose the compute dtype that a `dtype` key names, and say why, in words.

    "auto" is bf16 if the hardware has it, else fp16 on CUDA and fp32 on the CPU.

    Raises:
        UserError: bf16 on a CUDA device without it.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        has_bf16 = capability >= BF16_COMPUTE_CAPABILITY
        hardware = f"compute capability {capability[0]}.{capability[1]}"
    else:
        has_bf16 = cpu_has_bf16()
        hardware = "a processor with bf16 instructions" if has_bf16 else "a processor without bf16 instructions"
    if name == "auto":
        name = "bf16" if has_bf16 else ("fp16" if device.type == "cuda" else "fp32")
        return PRECISION_STR_TO_DTYPE[name], f"{name}, chosen for {hardware}"
    if name == "bf16" and device.type == "cuda" and not has_bf16:
        raise UserError(
            f"dtype: 'bf16' needs compute capability 8.0, this device has {hardware}; use dtype=fp16 or auto"
        )
    return PRECISION_STR_TO_DTYPE[name], name


def cpu_has_bf16() -> bool:
    # note: not in every torch of the supported range; without it, fp32 is the safe answer.
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
