"""The device and the number format of a run."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torchtune.training.precision import PRECISION_STR_TO_DTYPE

from custom_components.runtime.errors import UserError

NUM_LOADING_THREADS = min(4, os.cpu_count() or 1)

# bf16 in hardware from compute capability 8.0 (Ampere) on: CUDA C++ Programming Guide, table of compute capabilities.
BF16_COMPUTE_CAPABILITY = (8, 0)


# What the driver of an NVIDIA card leaves in the file system: on Linux, and under Windows Subsystem for Linux.
_NVIDIA_DRIVER_PATHS = (Path("/proc/driver/nvidia/version"), Path("/usr/lib/wsl/lib/libcuda.so.1"))


def resolved_device(name: str) -> torch.device:
    """Choose the device that a `device` key names; "auto" is CUDA if there is a card, else the CPU (NF4 fails on mps).

    Returns:
        the device, with its index if it is CUDA's: tensors are on "cuda:0", which does not equal "cuda".

    Raises:
        UserError: the CUDA device does not exist, or cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and (reason := unused_card()):
            print(reason, file=sys.stderr)
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device: {name!r} is not there ({torch.cuda.device_count()} CUDA devices found); use device=auto"
        )
    # From torch 2.11 on, H100 and B200 take cuDNN's attention before flash attention. It makes a plan for every new
    # shape, about a second each, and every batch and every decoded token has a new shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)  # torchtune's offloading brings activations back to the current one
        torch.zeros(1, device=device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device: {name!r} cannot be used ({reason}); see in nvidia-smi whether another program has the card, or "
            "use another device"
        ) from None
    return device


def unused_card() -> str | None:
    """Say why torch does not see an NVIDIA card whose driver is there; None where there is none, or it is hidden."""
    if "CUDA_VISIBLE_DEVICES" in os.environ or not any(path.exists() for path in _NVIDIA_DRIVER_PATHS):
        return None
    if torch.version.cuda is None:
        reason, way_out = "this torch is made for the CPU only", "install torch as https://pytorch.org/get-started says"
    else:
        reason = f"the driver may be older than CUDA {torch.version.cuda} needs, for which this torch is made"
        way_out = "update the driver, or install a torch for its CUDA version, which nvidia-smi shows"
    return f"device: auto runs on the CPU, though there is an NVIDIA card: {reason}; {way_out}"


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
