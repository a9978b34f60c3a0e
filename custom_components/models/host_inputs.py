"""Layers' inputs kept in the host's memory between forward and backward, for rows too long for a card's.

Copies go on streams of their own, beside the computation: out while the layers above are computed, and back one layer
ahead of the backward.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Pinned memory is allocated in powers of two: in blocks of this size nothing of it is lost but the end of the last.
_BLOCK_BYTES = 2**26


@dataclass
class _Kept:
    """An input that is out, its blocks of pinned memory, and where it is copied back to once it is asked for."""

    shape: torch.Size
    dtype: torch.dtype
    blocks: list[Tensor]
    back: Tensor | None = None


class HostInputs:
    """Keeps inputs in pinned memory of the host, which is allocated as it is needed and used again by later steps.

    Args:
        device: the CUDA device that the inputs are on.
    """

    def __init__(self, device: torch.device) -> None:
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._free_blocks: list[Tensor] = []
        self._kept: list[_Kept] = []

    def put(self, input_1TD: Tensor) -> _Kept:
        parts = _bytes_of(input_1TD).split(_BLOCK_BYTES)
        kept = _Kept(input_1TD.shape, input_1TD.dtype, [self._free_block() for _ in parts])
        # Values that are still computed, and blocks that are still read, are waited for.
        self._out.wait_stream(torch.cuda.current_stream())
        self._out.wait_stream(self._in)
        with torch.cuda.stream(self._out):
            for block, part in zip(kept.blocks, parts, strict=True):
                block[: len(part)].copy_(part, non_blocking=True)
        input_1TD.record_stream(self._out)
        self._kept.append(kept)
        return kept

    def take(self, kept: _Kept) -> Tensor:
        assert kept is self._kept.pop(), "the backward takes inputs in the reverse order"
        back = self._called_back(kept)
        torch.cuda.current_stream().wait_stream(self._in)
        self._free_blocks += kept.blocks
        if self._kept:
            self._kept[-1].back = self._called_back(self._kept[-1])
        return back

    def _called_back(self, kept: _Kept) -> Tensor:
        """Have an input copied back, unless it is on its way."""
        if kept.back is not None:
            return kept.back
        back = torch.empty(kept.shape, dtype=kept.dtype, device=self._in.device)
        # What had this memory before may still be in use, and the copy to the host under way.
        self._in.wait_stream(torch.cuda.current_stream())
        self._in.wait_stream(self._out)
        with torch.cuda.stream(self._in):
            for block, part in zip(kept.blocks, _bytes_of(back).split(_BLOCK_BYTES), strict=True):
                part.copy_(block[: len(part)], non_blocking=True)
        back.record_stream(self._in)
        return back

    def _free_block(self) -> Tensor:
        if self._free_blocks:
            return self._free_blocks.pop()
        return torch.empty(_BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
