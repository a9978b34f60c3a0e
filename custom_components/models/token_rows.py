"""Rows of single tokens that are trained, in an embedding and an output head that are frozen otherwise.

As PEFT's `trainable_token_indices` (huggingface/peft 0.21.2, src/peft/tuners/trainable_tokens/layer.py), a trained row
takes the place of the frozen one. Rows of new tokens are the last ones of the frozen matrices, see `added_rows`.

Dimensions: `N` trained rows, `V` vocab_size, `D` embed_dim.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TiedLinear, TransformerDecoder

from custom_components.models.lora import FrozenLinear, LoRALinear
from custom_components.runtime.errors import UserError


class TokenRows(nn.Module):
    """Trained rows of a matrix: of an embedding, or of an output head.

    `rows` is (num_tokens, embed_dim) in fp32. `disabled` and `adapter_params` are torchtune's AdapterModule protocol.

    Args:
        token_ids: whose rows they are, in ascending order.
        num_embeddings: rows of the whole matrix.
        device: of the rows.
    """

    token_ids: Tensor
    row_numbers_V: Tensor

    def __init__(self, token_ids: Sequence[int], num_embeddings: int, embed_dim: int, device: torch.device) -> None:
        super().__init__()
        assert list(token_ids) == sorted({*token_ids}), token_ids
        self.disabled = False
        self.rows = nn.Parameter(torch.empty(len(token_ids), embed_dim, dtype=torch.float32, device=device))
        # note: buffers outside the checkpoint, so they have values even where the rows have none yet.
        ids_N = torch.tensor(token_ids, dtype=torch.long, device="cpu")
        numbers_V = torch.full((num_embeddings,), -1, device="cpu")
        numbers_V[ids_N] = torch.arange(len(token_ids), device="cpu")
        self.register_buffer("token_ids", ids_N, persistent=False)
        self.register_buffer("row_numbers_V", numbers_V, persistent=False)

    def adapter_params(self) -> list[str]:
        return ["rows"]

    def allocate(self, device: torch.device) -> None:
        """Give the rows memory on `device`, without values."""
        self.rows = nn.Parameter(torch.empty_like(self.rows, device=device))

    def initialize(self, weight_VD: Tensor) -> None:
        """Begin with the rows of the frozen matrix, which has been loaded."""
        rows_ND = weight_VD.detach()[self.token_ids.to(weight_VD.device)]
        self.rows = nn.Parameter(rows_ND.float())

    def embedded(self, tokens: Tensor, frozen: Tensor) -> Tensor:
        """Put the trained rows in the place of the frozen ones: (..., D) for ids (...)."""
        if self.disabled or len(self.token_ids) == 0:
            return frozen
        # note: without a list of the positions, whose length a card would have to be asked for.
        numbers = self.row_numbers_V[tokens]
        trained = F.embedding(numbers.clamp(min=0), self.rows.to(frozen.dtype))
        return torch.where((numbers >= 0).unsqueeze(-1), trained, frozen)

    def projected(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """Put the trained rows' logits in the place of the frozen ones, in place: (..., V) for states (..., D)."""
        if self.disabled:
            return logits
        return logits.index_copy_(-1, self.token_ids, F.linear(hidden, self.rows.to(hidden.dtype)))


class EmbeddingWithTokenRows(nn.Embedding):
    """A frozen embedding with trained rows.

    Attributes:
        num_added: rows at the end that the checkpoint lacks.
    """

    def __init__(self, weight: nn.Parameter, token_ids: Sequence[int], num_added: int) -> None:
        num_embeddings, embed_dim = weight.shape
        super().__init__(num_embeddings, embed_dim, _weight=weight, _freeze=True)
        self.weight = weight  # torch has made another parameter of it, which a head could not share
        self.num_added = num_added
        self.token_rows = TokenRows(token_ids, num_embeddings, embed_dim, weight.device)

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) -> (..., D)."""
        return self.token_rows.embedded(tokens, super().forward(tokens))


class HeadWithTokenRows(FrozenLinear):
    """A frozen output head with trained rows; `weight` may be the embedding's."""

    def __init__(self, weight: nn.Parameter, token_ids: Sequence[int]) -> None:
        num_embeddings, embed_dim = weight.shape
        super().__init__(embed_dim, num_embeddings, weight=weight)
        self.token_rows = TokenRows(token_ids, num_embeddings, embed_dim, weight.device)

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.token_rows.projected(input, self.plain_output(input))


class TiedHeadWithTokenRows(TiedLinear):
    """The output head that is an :class:`EmbeddingWithTokenRows`."""

    tied_module: EmbeddingWithTokenRows

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.tied_module.token_rows.projected(hidden, super().__call__(hidden))


def add_token_rows(model: TransformerDecoder, embedding_ids: Sequence[int], head_ids: Sequence[int] | None) -> None:
    """Let the rows of some tokens be trained, in place, and make room for those that the model lacks.

    Args:
        model: frozen, or with adapters; without values on the meta device, as rows that are added have none.
        embedding_ids: rows of the embedding.
        head_ids: rows of the output head; None: those of the embedding, for a tied head the very same.

    Raises:
        UserError: the head has an adapter, and rows of it are to be trained or added.
    """
    num_before, embed_dim = model.tok_embeddings.weight.shape
    num_embeddings = max([num_before, *(token + 1 for token in (*embedding_ids, *(head_ids or ())))])
    is_tied = isinstance(model.output, TiedLinear)
    has_adapter = isinstance(model.output, LoRALinear)
    own_head_ids = embedding_ids if head_ids is None and not is_tied else head_ids
    if has_adapter and (own_head_ids or num_embeddings > num_before or is_shared(model)):
        raise UserError(
            "rows of tokens are trained in the output head, which has an adapter as well: leave out one of the two, "
            "as with apply_lora_to_output=false"
        )

    def frozen(matrix: Tensor) -> nn.Parameter:
        shape = (num_embeddings, embed_dim)
        return nn.Parameter(matrix.new_empty(shape) if num_embeddings > num_before else matrix, requires_grad=False)

    head_weight = None if is_tied or has_adapter else frozen(model.output.weight)
    weight = frozen(model.tok_embeddings.weight)
    model.tok_embeddings = EmbeddingWithTokenRows(weight, sorted(embedding_ids), num_embeddings - num_before)
    if is_tied and head_ids is None:
        model.output = TiedHeadWithTokenRows(model.tok_embeddings)
    elif not has_adapter:
        model.output = HeadWithTokenRows(weight if head_weight is None else head_weight, sorted(own_head_ids or ()))


def train_token_rows(model: TransformerDecoder, token_ids: Sequence[int]) -> None:
    """Let the rows of some tokens be trained, in place, and with them every row that the model lacks.

    Args:
        model: see :func:`add_token_rows`.

    Raises:
        UserError: the output head has an adapter.
    """
    new = range(model.tok_embeddings.num_embeddings, max(token_ids, default=-1) + 1)
    add_token_rows(model, sorted({*token_ids, *new}), None)


def is_shared(model: TransformerDecoder) -> bool:
    """Tell whether the output head has the embedding's weight as its own parameter."""
    return not isinstance(model.output, TiedLinear) and model.output.weight is model.tok_embeddings.weight


def added_rows(model: TransformerDecoder) -> int:
    """Count the rows of new tokens, which are the last ones of embedding and head and not in the checkpoint."""
    return model.tok_embeddings.num_added if isinstance(model.tok_embeddings, EmbeddingWithTokenRows) else 0


def token_rows(model: TransformerDecoder) -> dict[str, TokenRows]:
    """List the model's trained rows, by the name of the module whose rows they are."""
    modules = {"tok_embeddings": model.tok_embeddings, "output": model.output}
    return {
        name: module.token_rows
        for name, module in modules.items()
        if isinstance(module, EmbeddingWithTokenRows | HeadWithTokenRows)
    }
