"""Adapters and trained models on disk."""

from pathlib import Path

import torch
from torch import nn
from torchtune.modules import TransformerDecoder

from custom_components.runs.model_weights import ModelWeights, files_beside_weights, matrix_dtype
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.prompt_format import PromptFormat
from custom_components.weights.adapters import save_adapter
from custom_components.weights.checkpoint_files import open_checkpoint
from tests.support.models import TOKENS, inference_model

WEIGHTS = "adapter_model.safetensors"
PROMPT_FORMAT = PromptFormat("llama2", "Be kind.", ["</s>"])


def saved_adapter(
    model: TransformerDecoder,
    directory: Path,
    prompt_format: PromptFormat = PROMPT_FORMAT,
    base_model: str = "a/base",
) -> Path:
    save_adapter(model, directory, base_model, prompt_format.texts())
    return directory


def saved_model(
    model: TransformerDecoder, checkpoint: Path, directory: Path, prompt_format: PromptFormat = PROMPT_FORMAT
) -> Path:
    """A model whose own weights were trained, as a run saves it. The tokenizer is Llama 2's in the format given."""
    base = open_checkpoint(checkpoint)
    transform = Llama2ChatTransform(
        base.tokenizer_model, prompt_template=prompt_format.prompt_template, system_prompt=prompt_format.system_prompt
    )
    files = files_beside_weights(directory.parent, base, transform, prompt_format, matrix_dtype(model))
    ModelWeights(model, base, files).save(directory)
    return directory


def assert_same_logits(checkpoint: Path, adapter_dir: Path, theirs: nn.Module) -> TransformerDecoder:
    """Load base and adapter, and hold the logits against those of another library's model."""
    model = inference_model(checkpoint, adapter_dir)
    with torch.no_grad():
        expected = theirs(TOKENS)
        torch.testing.assert_close(model(TOKENS), getattr(expected, "logits", expected), atol=1e-4, rtol=0)
    return model
