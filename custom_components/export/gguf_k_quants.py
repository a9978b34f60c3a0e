"""GGUF files of about four and five bits a weight, made by llama.cpp's own quantizer through llama-cpp-python."""

import ctypes
import importlib
import logging
import os
from pathlib import Path
from types import ModuleType

from custom_components.runtime.errors import UserError

# llama.cpp's name of each kind, and its bytes a value, those of Llama 3.1 8B in ggml-org/llama.cpp, tools/quantize,
# README.md: kinds of several widths are mixed.
K_QUANTS = {"q4_k_m": ("LLAMA_FTYPE_MOSTLY_Q4_K_M", 4.89 / 8), "q5_k_m": ("LLAMA_FTYPE_MOSTLY_Q5_K_M", 5.70 / 8)}


def import_llama_cpp(quantization: str) -> ModuleType:
    """Import llama-cpp-python.

    Raises:
        UserError: it is not installed, or cannot be loaded.
    """
    try:
        return importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"quantization: {quantization} needs llama.cpp's quantizer ({error}); `pip install llama-cpp-python`, or "
            f"set quantization=f16 and run `llama-quantize x-f16.gguf x.gguf {quantization}`"
        ) from None


def quantize_gguf(source: Path, path: Path, quantization: str) -> None:
    """Write a GGUF file in f16 once more, with fewer bits.

    Raises:
        UserError: llama.cpp could not, for a full disk say.
    """
    llama_cpp = import_llama_cpp(quantization)
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # it prints a line for every tensor
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, K_QUANTS[quantization][0])
    parameters.nthread = os.cpu_count() or 1
    code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(path), ctypes.byref(parameters))
    if code != 0 or not path.is_file():
        raise UserError(f"quantization: llama.cpp could not write {path.name} ({code}); set quantization=f16 or q8_0")
