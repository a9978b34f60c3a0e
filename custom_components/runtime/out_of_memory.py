"""Errors that say that a device has no memory left."""

import torch

# What CUDA's libraries say then, in errors that are no torch.OutOfMemoryError.
_TEXTS = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Check whether an error says that a device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _TEXTS)
