"""What to change when a step does not fit the device."""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from custom_components.datasets.batching import Batch
from custom_components.runtime.errors import UserError


class StepLimit:
    """Remembers what the steps that fitted took, to say how much fits when one does not.

    Memory grows with the tokens of a forward in a straight line, over what stands before the first step.
    """

    def __init__(self, device: torch.device, batch_size: int) -> None:
        self._device = device
        self._batch_size = batch_size
        self._standing_bytes = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # loading's peak is not a step's
            self._standing_bytes = torch.cuda.memory_allocated(device)
        self.bytes_per_token = 0.0

    @contextlib.contextmanager
    def step(self, number: int, batches: Sequence[Batch]) -> Iterator[None]:
        """Run a step's forwards and backwards in this block.

        Raises:
            UserError: they do not fit, with what would.
        """
        largest_forward_tokens = max(batch.num_tokens for batch in batches)
        try:
            yield
        except torch.OutOfMemoryError:
            raise self.error(number, largest_forward_tokens) from None
        self.add_step(largest_forward_tokens)

    def add_step(self, largest_forward_tokens: int) -> None:
        """Take note of a step that fitted."""
        if self._device.type == "cuda":
            growth_bytes = torch.cuda.max_memory_allocated(self._device) - self._standing_bytes
            self.bytes_per_token = max(self.bytes_per_token, growth_bytes / largest_forward_tokens)

    def error(self, step: int, largest_forward_tokens: int) -> UserError:
        """What to tell the user about a step whose largest forward did not fit."""
        num_fitting_tokens = largest_forward_tokens // 2
        if self.bytes_per_token:
            total_bytes = torch.cuda.get_device_properties(self._device).total_memory
            # A tenth is left for what the allocator cannot use and for other programs.
            num_fitting_tokens = int((0.9 * total_bytes - self._standing_bytes) / self.bytes_per_token)
        batch_size = self._batch_size
        fitting_batch_size = max(1, min(batch_size - 1, batch_size * num_fitting_tokens // largest_forward_tokens))
        smaller_rows = ""
        if batch_size == 1:
            smaller_rows = f" and max_seq_len={max(8, min(num_fitting_tokens, largest_forward_tokens - 1))}"
        return UserError(
            f"step {step}: {largest_forward_tokens} tokens in one forward do not fit the memory of {self._device}; "
            f"set batch_size={fitting_batch_size}{smaller_rows} "
            "(raise gradient_accumulation_steps to keep the rows of a step), or enable_activation_checkpointing=true"
        )
