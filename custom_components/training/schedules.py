"""Learning-rate schedules: pure functions of the step, so that resuming has nothing to remember.

Each returns the factor of the peak learning rate at `step`, counted from 1 to `num_steps`. Warm-up rises from
1 / num_warmup_steps, so no step has rate 0; after it, the first step has the full rate.
"""

import math


def constant(step: int, num_steps: int, num_warmup_steps: int = 0) -> float:
    """Keep the full rate after warm-up."""
    return min(1.0, step / num_warmup_steps) if num_warmup_steps else 1.0


def linear(step: int, num_steps: int, num_warmup_steps: int = 0, final_ratio: float = 0.0) -> float:
    """Fall in a straight line to `final_ratio` of the peak, reached one step after the last."""
    return _decayed(1.0 - _progress(step, num_steps, num_warmup_steps), step, num_warmup_steps, final_ratio)


def cosine(step: int, num_steps: int, num_warmup_steps: int = 0, final_ratio: float = 0.0) -> float:
    """Fall along half a cosine to `final_ratio` of the peak (Loshchilov & Hutter 2017, arXiv 1608.03983, section 3)."""
    remaining = 0.5 * (1.0 + math.cos(math.pi * _progress(step, num_steps, num_warmup_steps)))
    return _decayed(remaining, step, num_warmup_steps, final_ratio)


def num_warmup_steps(warmup_steps: int | None, warmup_ratio: float, num_steps: int) -> int:
    """Count the optimizer steps of warm-up: `warmup_steps` where given, else that share of all steps, rounded up."""
    return warmup_steps if warmup_steps is not None else math.ceil(warmup_ratio * num_steps)


def _progress(step: int, num_steps: int, num_warmup_steps: int) -> float:
    """Return 0 at the first step after warm-up and 1 one step after the last."""
    return (step - num_warmup_steps - 1) / max(1, num_steps - num_warmup_steps)


def _decayed(remaining: float, step: int, num_warmup_steps: int, final_ratio: float) -> float:
    if step <= num_warmup_steps:
        return step / num_warmup_steps
    return final_ratio + (1.0 - final_ratio) * remaining
