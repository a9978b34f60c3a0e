"""The C library's allocator: what it does with freed memory decides the speed of large tensors on the CPU."""

import ctypes
import sys

# glibc 2.36, malloc/malloc.h, M_TRIM_THRESHOLD and M_MMAP_MAX.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Let the process use freed blocks again; without glibc nothing changes.

    By default glibc maps every block over 32 MiB anew and returns it when it is freed, and the system zeroes it page
    by page at each first touch. A dequantized weight is such a block: one of 4096 x 11008 took 45 ms, of which 38
    were page faults (`benchmarks/README.md`).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Return free memory to the system, after loading for example; without glibc nothing happens."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if malloc_trim is not None:
        malloc_trim(ctypes.c_size_t(0))
