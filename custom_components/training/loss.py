"""The loss that a config names: cross-entropy of the supervised positions.

Dimensions: `P` supervised positions, `D` embed_dim.
"""

from pydantic import PositiveInt
from torch import Tensor, nn
from torchtune.modules import TiedLinear

from custom_components.models.output_head import label_losses


class LinearCrossEntropy:
    """Output head and cross-entropy in one, over chunks of supervised positions.

    Args:
        chunk_size: positions whose logits exist at a time. More: slightly faster, more memory.
    """

    def __init__(self, chunk_size: PositiveInt = 512) -> None:
        self.chunk_size = chunk_size

    def __call__(self, hidden_PD: Tensor, output_head: nn.Module | TiedLinear, labels_P: Tensor) -> Tensor:
        """Sum the losses of all positions: a scalar in fp32. See :meth:`position_losses`."""
        return self.position_losses(hidden_PD, output_head, labels_P).sum()

    def position_losses(self, hidden_PD: Tensor, output_head: nn.Module | TiedLinear, labels_P: Tensor) -> Tensor:
        """Compute the loss of each position, (P,), in nats and fp32.

        The gradient reaches the hidden states, and what is trained of the head.

        Args:
            hidden_PD: normalized hidden states, before the output head.
            output_head: the model's `output`: a linear layer, tied or not, frozen or trained, with or without an
                adapter.
            labels_P: the id to predict at each position.
        """
        return label_losses(hidden_PD, output_head, labels_P, self.chunk_size)
