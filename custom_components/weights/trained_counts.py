"""How many parameters were trained, counted in the files of the trained weights. Only headers are read."""

import math
from collections.abc import Sequence
from pathlib import Path

from custom_components.models.trained import trained_names
from custom_components.weights.checkpoint_files import tensors_of_file
from custom_components.weights.names import TUNE_NAMES_OF_HUGGING_FACE, translated_name


def num_adapter_parameters(adapter_dir: Path, init_lora_weights: str | None = None) -> int:
    """Count the parameters of an adapter: all that its files hold is trained, or of PiSSA's A and B the first half.

    Args:
        init_lora_weights: of the run's config.

    Raises:
        UserError: a file is damaged.
    """
    tensors = [tensor for file in sorted(adapter_dir.glob("*.safetensors")) for tensor in tensors_of_file(file)]
    num_of_pissa = sum(math.prod(tensor.shape) for tensor in tensors if ".lora_" in tensor.stored_name)
    num_stored = sum(math.prod(tensor.shape) for tensor in tensors)
    return num_stored - num_of_pissa // 2 if init_lora_weights == "pissa" else num_stored


def num_trained_model_parameters(model_dir: Path, train_only: Sequence[str] | None) -> int:
    """Count the parameters of a model in Hugging Face's layout that were trained.

    Args:
        train_only: see :func:`trained_names`.

    Raises:
        UserError: a file is damaged.
    """
    is_trained = trained_names(train_only)
    tensors = [tensor for file in sorted(model_dir.glob("*.safetensors")) for tensor in tensors_of_file(file)]
    names = [translated_name(tensor.stored_name, TUNE_NAMES_OF_HUGGING_FACE) for tensor in tensors]
    return sum(
        math.prod(tensor.shape)
        for tensor, name in zip(tensors, names, strict=True)
        if name is not None and is_trained(name)
    )
