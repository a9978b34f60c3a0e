"""Tensor names and row orders of Hugging Face's checkpoints and of torchtune's models."""

from torch import Tensor
from torchtune.models.convert_weights import _FROM_HF

# Hugging Face's name of a tensor by torchtune's, for `get_mapped_key`, which fills in the layer's number.
HUGGING_FACE_NAMES = {tune: hf for hf, tune in _FROM_HF.items() if tune is not None}


def interleave_rope_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of q or k (or of their adapter's B) from Hugging Face's order to torchtune's and Meta's.

    Hugging Face rotates the two halves of a head against each other, Meta neighbouring pairs; its conversion
    (transformers, models/llama/convert_llama_weights_to_hf.py, `permute`) moved row 2i to i and 2i+1 to H/2+i.

    Args:
        weight: (num_heads * head_dim, ...).
    """
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halve_rope_rows(weight: Tensor, num_heads: int) -> Tensor:
    """The inverse of :func:`interleave_rope_rows`."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
