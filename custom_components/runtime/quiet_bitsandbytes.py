"""Importing bitsandbytes silently and without the network."""

import functools
import importlib
import logging
import sys
import warnings
from types import ModuleType


@functools.cache
def import_bitsandbytes() -> ModuleType | None:
    """Import the module; None if it is not installed or does not load. Every import of it goes through here."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"bitsandbytes\b")  # older versions use what newer torch will drop
    # note: on processors with AVX512-bf16, importing bitsandbytes fetches a kernel from the hub and runs it where the
    # package `kernels` is installed. None in sys.modules makes that package's import fail: nothing is fetched.
    kernels_before = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError):
        return None
    finally:
        del sys.modules["kernels"]
        if kernels_before is not None:
            sys.modules["kernels"] = kernels_before
