"""What a training run prints about itself, at its start and at its end."""

import os
import shlex
from collections.abc import Sequence

import torch
from torchtune.modules import TransformerDecoder

from custom_components.runs.checkpoints import run_checkpoint_path
from custom_components.runs.run import Run
from custom_components.runtime.launched import launch_options
from custom_components.runtime.terminal import say
from custom_components.training.state import Progress
from custom_components.weights.checkpoint_loading import base_format, unquantized_modules

# Overrides of the command that began a run and that would not go on with it.
_NOT_FOR_GOING_ON = ("resume_from_checkpoint=", "overwrite_output_dir=", "init_adapter_from=")


def describe_adapted_model(model: TransformerDecoder, device: torch.device, dtype_words: str) -> None:
    """Print device and dtype, and how much of an adapter is trained over what base."""
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    format = base_format(model)
    base = format or dtype_words.split(",")[0]
    say(f"device {device}, dtype {dtype_words}\n{num_trained:,} trained parameters in fp32 over a base in {base}")
    if format and (names := unquantized_modules(model)):
        say(f"not quantized, NF4 blocks do not divide them: {', '.join(names)}")


def describe_trained_model(model: TransformerDecoder, device: torch.device, dtype_words: str, weights: str) -> None:
    """Print device and dtype, and how much of a model's own weights is trained.

    Args:
        weights: their dtype, in words.
    """
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    num_all = sum(parameter.numel() for parameter in model.parameters())
    of_all = "all" if num_trained == num_all else f"of {num_all:,}"
    say(f"device {device}, dtype {dtype_words}\n{num_trained:,} trained parameters, {of_all}, in {weights}")


def closing_summary(run: Run, progress: Progress, seconds: float) -> str:
    """Summarize what a run took and where its results are.

    Args:
        seconds: from the start of the program.
    """
    peak_gib = run.memory.gib()
    return (
        f"\n{progress.num_steps} steps"
        + (f" ({progress.num_skipped_steps} skipped, fp16 overflowed)" if progress.num_skipped_steps else "")
        + f", {progress.num_tokens} tokens in {progress.seconds:.1f} s of training "
        f"({progress.num_tokens / progress.seconds:.0f} tokens/s), {seconds:.1f} s since the program began"
        + (f", peak memory {peak_gib:.2f} GiB" if peak_gib is not None else "")
        + f"\n{run.weights.name:7} {run.directory.result}, {which_step(progress)}"
        + f"\nplot    {run.directory.plot}\nmetrics {run.directory.metrics}"
    )


def which_step(progress: Progress) -> str:
    """Say of which step a run's result is."""
    if progress.best_step is None:
        return "the last step's"
    return f"step {progress.best_step}'s, the best by validation loss ({progress.best_val_loss:.4f})"


def stopped_summary(run: Run, progress: Progress, num_planned_steps: int, arguments: Sequence[str]) -> str:
    """Say what a run that was asked to stop has saved, and the command that goes on with it.

    Args:
        arguments: of the program, the recipe's file first.
    """
    again = [argument for argument in arguments[1:] if not argument.startswith(_NOT_FOR_GOING_ON)]
    command = ["tune", "run", *launch_options(), os.path.relpath(arguments[0]), *again, "resume_from_checkpoint=true"]
    return (
        f"\nstopped at step {progress.num_steps} of {num_planned_steps}; saved:"
        f"\ncheckpoint {run_checkpoint_path(run.directory.path, progress.num_steps)}"
        f"\n{run.weights.name:10} {run.directory.result}, {which_step(progress)}"
        f"\nplot       {run.directory.plot}"
        f"\ngo on with\n  {shlex.join(command)}"
    )
