"""The parts of a model whose own weights are trained, and the choice of those that are.

The weights may be in fp32 where the products are in 16 bits: they are cast to the input's dtype for each product.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TiedLinear, TransformerDecoder

from custom_components.models.linear_names import HUGGING_FACE_PARTS
from custom_components.runtime.errors import UserError


class TrainedLinear(nn.Linear):
    """A linear layer without bias whose weight is trained."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim)."""
        return F.linear(input, self.weight.to(input.dtype))


class TrainedTiedLinear(TiedLinear):
    """An output head that has the embeddings' weight."""

    def __call__(self, input: Tensor) -> Tensor:
        """(..., embed_dim) -> (..., vocab_size)."""
        return F.linear(input, self.tied_module.weight.to(input.dtype))


class TokenEmbedding(nn.Embedding):
    """The embeddings of tokens; all that is computed from them has their dtype.

    Attributes:
        compute_dtype: that they are given out in; None: their own.
    """

    compute_dtype: torch.dtype | None = None

    def forward(self, input: Tensor) -> Tensor:
        """(...,) -> (..., embed_dim)."""
        embeddings = super().forward(input)
        return embeddings if self.compute_dtype is None else embeddings.to(self.compute_dtype)


def trained_names(train_only: Sequence[str] | None) -> Callable[[str], bool]:
    """Make the test for the names of parameters that are trained.

    Args:
        train_only: patterns of torchtune's or Hugging Face's names, of parameters or of the modules around them:
            `layers.30`, `layers.3?.mlp.*`, `norm`, `lm_head`. None: all are trained.
    """
    if train_only is None:
        return lambda name: True
    return lambda name: any(_matches(name, pattern) for pattern in train_only)


def train_parameters(model: TransformerDecoder, train_only: Sequence[str] | None) -> None:
    """Mark the parameters of a model as trained or frozen, in place, as :func:`trained_names` chooses.

    Raises:
        UserError: a pattern matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in train_only or ():
        if not any(_matches(name, pattern) for name in names):
            tied = isinstance(model.output, TiedLinear) and any(
                _matches(f"{head}.weight", pattern) for head in ("output", "lm_head")
            )
            why = "the head is tied to the embeddings: name tok_embeddings" if tied else _examples(model)
            raise UserError(f"train_only: {pattern!r} matches no weight of the model; {why}")
    if train_only is not None and not train_only:
        raise UserError("train_only: [] leaves nothing to train; null trains all weights")
    is_trained = trained_names(train_only)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name))


def trained_base_parameters(model: nn.Module) -> list[Tensor]:
    """List the parameters of a model itself, not of an adapter, that are trained; norms are not among them."""
    modules = [module for module in model.modules() if isinstance(module, TrainedLinear | TokenEmbedding)]
    return [module.weight for module in modules if module.weight.requires_grad]


@contextlib.contextmanager
def gradients_freed(model: nn.Module, *, frees: bool = True) -> Iterator[None]:
    """Inside the block, a backward frees the gradient of every parameter as soon as it is complete.

    Args:
        frees: False: it does not.
    """

    def free(parameter: Tensor) -> None:
        parameter.grad = None

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad and frees]
    hooks = [parameter.register_post_accumulate_grad_hook(free) for parameter in trained]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _matches(name: str, pattern: str) -> bool:
    return any(fnmatchcase(spelling, pattern) for spelling in _spellings(name))


def _spellings(name: str) -> Iterator[str]:
    """List the names of a parameter and of the modules around it, as torchtune and as Hugging Face spell them."""
    parts = name.split(".")
    theirs = [HUGGING_FACE_PARTS.get(part, part) for part in parts]
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])
        yield ".".join(theirs[:end])
        yield ".".join(["model", *theirs[:end]])


def _examples(model: TransformerDecoder) -> str:
    return (
        f"names are tok_embeddings, layers.0 to layers.{len(model.layers) - 1} with attn.q_proj or mlp.w1 for example, "
        "norm and output, and a * stands for any part of them"
    )
