"""Advice for a step that does not fit the device."""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from custom_components.datasets.batching import Batch
from custom_components.runtime.errors import UserError
from custom_components.runtime.out_of_memory import is_out_of_memory


class StepLimit:
    """Remembers how much memory the steps that fitted needed, to say what fits when one does not.

    Memory grows linearly with the tokens of a forward, on top of what is allocated before the first step.
    """

    def __init__(self, device: torch.device, batch_size: int) -> None:
        self._device = device
        self._batch_size = batch_size
        self._bytes_before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # loading's peak is not a step's
            self._bytes_before = torch.cuda.memory_allocated(device)
        self.bytes_per_token = 0.0

    @contextlib.contextmanager
    def step(self, number: int, batches: Sequence[Batch]) -> Iterator[None]:
        """Run a step's forwards and backwards in this block.

        Raises:
            UserError: they do not fit; it says what would.
        """
        largest_forward_tokens = max((batch.num_tokens for batch in batches), default=0)
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise self.error(number, largest_forward_tokens) from None
        self.add_step(largest_forward_tokens)

    def add_step(self, largest_forward_tokens: int) -> None:
        """Record a step that fitted."""
        if self._device.type == "cuda" and largest_forward_tokens:
            growth_bytes = torch.cuda.max_memory_allocated(self._device) - self._bytes_before
            self.bytes_per_token = max(self.bytes_per_token, growth_bytes / largest_forward_tokens)

    def error(self, step: int, largest_forward_tokens: int) -> UserError:
        """Make the error of a step whose largest forward did not fit, with the settings to change."""
        num_fitting_tokens = largest_forward_tokens // 2
        if self.bytes_per_token:
            total_bytes = torch.cuda.get_device_properties(self._device).total_memory
            # A tenth is left for fragmentation and other programs.
            num_fitting_tokens = int((0.9 * total_bytes - self._bytes_before) / self.bytes_per_token)
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
