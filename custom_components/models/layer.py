"""A layer of a Llama."""

import torch
from torch import Tensor
from torchtune.modules import TransformerSelfAttentionLayer

from custom_components.models.attention import RowLengths
from custom_components.models.layer_in_pieces import PIECE_TOKENS, LayerInputs, layer_in_pieces, recomputed_layer


class LlamaLayer(TransformerSelfAttentionLayer):
    """torchtune's layer, that can also keep nothing but its input for the backward, which computes the rest again."""

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | RowLengths | None = None,
        input_pos: Tensor | None = None,
        kept_in: LayerInputs | None = None,
        **without_encoder: None,
    ) -> Tensor:
        """(B, S, embed_dim) -> (B, S, embed_dim).

        Args:
            mask, input_pos: see :class:`SelfAttention`.
            kept_in: keeps the input for the backward; rows are then end to end, and positions given. None: autograd
                keeps what it needs.
            without_encoder: what torchtune's decoder gives every layer, and one without an encoder ignores.
        """
        if kept_in is not None:
            assert isinstance(mask, RowLengths) and input_pos is not None
            return torch.compiler.disable(recomputed_layer)(self, x, mask, input_pos, kept_in)
        if isinstance(mask, RowLengths) and x.shape[1] > PIECE_TOKENS and not torch.compiler.is_compiling():
            # In pieces as well, so that dropout draws the same whether a layer is recomputed or not.
            assert input_pos is not None
            return layer_in_pieces(self, x, mask, input_pos)
        return super().forward(x, mask=mask, input_pos=input_pos)
