"""What a training run prints about itself, at its start and at its end."""

import torch
from torchtune.modules import TransformerDecoder

from custom_components.runs.run_directory import RunDirectory
from custom_components.runtime.process_memory import PeakMemory
from custom_components.training.state import Progress
from custom_components.weights.checkpoint_loading import unquantized_modules


def describe_model(
    model: TransformerDecoder, device: torch.device, dtype_words: str, *, is_base_quantized: bool
) -> None:
    """Print device and dtype, and how much is trained over what base."""
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    base = "NF4" if is_base_quantized else dtype_words.split(",")[0]
    print(f"device {device}, dtype {dtype_words}; {num_trained:,} trained parameters in fp32 over a base in {base}")
    if is_base_quantized and (names := unquantized_modules(model)):
        print(f"not quantized, NF4 blocks do not divide them: {', '.join(names)}")


def closing_summary(progress: Progress, seconds: float, memory: PeakMemory, directory: RunDirectory) -> str:
    """Summarize what a run took and where its results are.

    Args:
        seconds: from the start of the program.
    """
    peak_gib = memory.gib()
    which = "the last step's"
    if progress.best_step is not None:
        which = f"step {progress.best_step}'s, the best by validation loss ({progress.best_val_loss:.4f})"
    return (
        f"\n{progress.num_steps} steps"
        + (f" ({progress.num_skipped_steps} skipped, fp16 overflowed)" if progress.num_skipped_steps else "")
        + f", {progress.num_tokens} tokens in {progress.seconds:.1f} s of training "
        f"({progress.num_tokens / progress.seconds:.0f} tokens/s), {seconds:.1f} s in all"
        + (f", peak memory {peak_gib:.2f} GiB" if peak_gib is not None else "")
        + f"\nadapter {directory.adapter}, {which}"
        + f"\nplot    {directory.plot}\nmetrics {directory.metrics}"
    )
