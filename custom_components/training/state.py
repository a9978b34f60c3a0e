"""State of a run: everything that changes while it trains."""

import math
from dataclasses import dataclass, field

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer
from torchtune.modules import TransformerDecoder


@dataclass
class Progress:
    """How far a run is, and its best validation so far.

    Attributes:
        num_skipped_steps: optimizer steps that the gradient scaler skipped because fp16 gradients overflowed.
        best_step: the step of the lowest validation loss so far; None before the first validation.
        num_validations_since_best: for early stopping.
    """

    num_steps: int = 0
    num_skipped_steps: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    best_val_loss: float = math.inf
    best_step: int | None = None
    num_validations_since_best: int = 0

    def add_step(self, num_tokens: int, seconds: float, is_skipped: bool) -> None:
        self.num_steps += 1
        self.num_skipped_steps += is_skipped
        self.num_tokens += num_tokens
        self.seconds += seconds

    def stops_early(self, patience: int | None) -> bool:
        """Check whether `patience` validations in a row were no better than the best; None: never."""
        return patience is not None and self.num_validations_since_best >= patience

    def add_validation(self, val_loss: float) -> bool:
        """Count a validation after the last step; return whether it is the best so far."""
        if val_loss >= self.best_val_loss:
            self.num_validations_since_best += 1
            return False
        self.best_val_loss, self.best_step, self.num_validations_since_best = val_loss, self.num_steps, 0
        return True


@dataclass
class TrainingState:
    """Everything that changes while training, except the trained weights in the model.

    Attributes:
        data_digest: of the rows trained on; a run resumes with the same rows only.
        num_ranks: that the run was begun with; a step has the forwards of so many, also on fewer or more.
        best_adapter: the adapter's parameters at the best validation, by name; empty before the first.
    """

    optimizer: Optimizer
    scaler: GradScaler
    data_digest: str
    num_ranks: int = 1
    progress: Progress = field(default_factory=Progress)
    best_adapter: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # The optimizer's own are those of the step. Where they are tensors, in fp32, its 7 digits are the config's.
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.peak_rates = [float(f"{rate.item():.7g}") if isinstance(rate, Tensor) else rate for rate in rates]

    def keep_best(self, model: TransformerDecoder) -> None:
        self.best_adapter = {
            name: parameter.detach().cpu().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
