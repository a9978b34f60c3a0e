"""What a training run has to remember: everything else is a function of the step."""

import math
from dataclasses import dataclass


@dataclass
class Progress:
    """What has been done so far."""

    num_steps: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    last_num_tokens: int = 0
    last_seconds: float = 0.0
    best_val_loss: float = math.inf
    best_step: int | None = None

    def add_step(self, num_tokens: int, seconds: float) -> None:
        self.num_steps += 1
        self.num_tokens += num_tokens
        self.seconds += seconds
        self.last_num_tokens, self.last_seconds = num_tokens, seconds

    def add_validation(self, step: int, val_loss: float) -> bool:
        """Whether it is the best so far."""
        if val_loss >= self.best_val_loss:
            return False
        self.best_val_loss, self.best_step = val_loss, step
        return True
