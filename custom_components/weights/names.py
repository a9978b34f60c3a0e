"""Tensor names and row orders of Hugging Face's and Meta's checkpoints and of torchtune's models."""

import re
from collections.abc import Mapping

from torch import Tensor
from torchtune.models.convert_weights import _FROM_HF, _FROM_META

# torchtune's name of a tensor by Hugging Face's and by Meta's, {} for the layer's number; None: torchtune has none.
TUNE_NAMES_OF_HUGGING_FACE: Mapping[str, str | None] = _FROM_HF
TUNE_NAMES_OF_META: Mapping[str, str | None] = _FROM_META
# Hugging Face's name of a tensor by torchtune's.
HUGGING_FACE_NAMES = {tune: hf for hf, tune in _FROM_HF.items() if tune is not None}


def translated_name(name: str, names: Mapping[str, str | None]) -> str | None:
    """Translate a tensor's name by one of the tables above; None: it is not in the table."""
    layer = re.search(r"\.(\d+)\.", name)
    other = names.get(re.sub(r"\.\d+\.", ".{}.", name, count=1))
    return other.format(layer[1] if layer else "") if other else None


def interleave_rope_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Bring rows of q or k (or of their adapter's B) from Hugging Face's order to torchtune's and Meta's.

    Hugging Face rotates the two halves of a head against each other, Meta neighbouring pairs; its conversion
    (transformers, models/llama/convert_llama_weights_to_hf.py, `permute`) moved row 2i to i and 2i+1 to H/2+i.

    Args:
        weight: (num_heads * head_dim, ...).
    """
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halve_rope_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Undo :func:`interleave_rope_rows`."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
