"""Writing a model as a GGUF file, which llama.cpp and what is built on it run.

Format: ggml-org/ggml, docs/gguf.md; which keys a Llama has: ggml-org/llama.cpp, @0c1e5709, convert_hf_to_gguf.py with
conversion/llama.py and conversion/base.py (`prepare_tensors`).
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchtune.models.convert_weights import get_mapped_key

from custom_components.export.gguf_tokenizer import add_tokenizer
from custom_components.models.llama import lora_llama
from custom_components.models.rotary import rope_frequency_divisors_P
from custom_components.models.shapes import LlamaShape
from custom_components.runtime.atomic_files import whole_file
from custom_components.runtime.errors import UserError
from custom_components.transforms.tokenizer_files import ExportedTokenizer
from custom_components.weights.names import HUGGING_FACE_NAMES

# Rows that are converted together: a few tens of MB beside the tensor, whatever its size.
_NUM_ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class _PlannedTensor:
    """A tensor's place in the file: its first byte counted from the start of the tensor data, and how it is stored."""

    gguf_name: str
    shape: tuple[int, ...]
    encoding: Any  # gguf.GGMLQuantizationType
    num_bytes: int
    offset: int


def write_gguf(
    path: Path,
    shape: LlamaShape,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    tokenizer: ExportedTokenizer,
    quantization: Literal["f16", "q8_0"],
    name: str,
) -> None:
    """Write a model with its tokenizer as one GGUF file, whole or not at all; what was at `path` is replaced.

    Tensors are converted and written one at a time, in the order they come, and none is kept.

    Args:
        shape: of the tensors given. With `tied_embeddings` there must be no `output.weight`.
        tensors: every tensor of the model once, in any order, under torchtune's name and with torchtune's row order of
            q and k, which is also that of GGUF's `llama` architecture. Any floating dtype, any device.
        tokenizer: written with its chat template, if it has one.
        quantization: "f16", or "q8_0": blocks of 32 values in 8 bits with one f16 scale. Norms stay in f32, and under
            q8_0 matrices whose rows do not divide into blocks in f16.
        name: the model's name, for people.

    Raises:
        UserError: the package gguf is not installed, the tokenizer is not one that llama.cpp can reproduce, or a value
            is not finite in f16. Package and tokenizer are checked before the first tensor is asked for.
        AssertionError: tensors that are not those of `shape`.
    """
    gguf = import_gguf()
    writer = gguf.GGUFWriter(None, "llama")
    _add_model(writer, gguf, shape, name, quantization)
    add_tokenizer(writer, tokenizer, shape.vocab_size)
    plan = _planned_tensors(gguf, shape, quantization)
    for planned in plan.values():
        writer.add_tensor_info(planned.gguf_name, planned.shape, None, planned.num_bytes, planned.encoding)
    with whole_file(path) as aside:
        writer.write_header_to_file(aside)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with aside.open("r+b") as file:
            data_start = writer.ggml_pad(aside.stat().st_size, writer.data_alignment)
            file.truncate(data_start + sum(writer.ggml_pad(t.num_bytes, writer.data_alignment) for t in plan.values()))
            for tune_name, tensor in itertools.chain(_rope_tensors(shape), tensors):
                planned = plan.pop(tune_name)
                assert tuple(tensor.shape) == planned.shape, f"{tune_name}: {tuple(tensor.shape)}, not {planned.shape}"
                file.seek(data_start + planned.offset)
                for rows in _encoded_rows(gguf, tensor, planned, tune_name):
                    file.write(rows.data)
        assert not plan, f"no tensor was given for {sorted(plan)}"


def import_gguf() -> ModuleType:
    """Import the package gguf.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise UserError(f"format: gguf needs the package gguf ({error}); install it with `pip install gguf`") from None
    return gguf


def _add_model(writer: Any, gguf: ModuleType, shape: LlamaShape, name: str, quantization: str) -> None:
    file_types = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(file_types[quantization])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(shape.max_seq_len)
    writer.add_embedding_length(shape.embed_dim)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.intermediate_dim)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    if shape.rope_scaling is not None and shape.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(shape.rope_scaling.factor)
    if shape.own_head_dim is not None:
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.norm_eps)


def _planned_tensors(gguf: ModuleType, shape: LlamaShape, quantization: str) -> dict[str, _PlannedTensor]:
    """Every tensor of a model of this shape by torchtune's name, one after the other in the file."""
    with torch.device("meta"):
        model = lora_llama(shape, lora_attn_modules=[])
    gguf_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.num_layers)
    encodings = gguf.GGMLQuantizationType
    plan, offset = {}, 0
    for tune_name, parameter in model.named_parameters():
        encoding = encodings.F16 if quantization == "f16" else encodings.Q8_0
        if parameter.dim() == 1:
            encoding = encodings.F32
        elif parameter.shape[-1] % gguf.GGML_QUANT_SIZES[encoding][0] != 0:
            encoding = encodings.F16
        values_per_block, bytes_per_block = gguf.GGML_QUANT_SIZES[encoding]
        num_bytes = parameter.numel() // values_per_block * bytes_per_block
        gguf_name = gguf_names.get_name(get_mapped_key(tune_name, HUGGING_FACE_NAMES), try_suffixes=(".weight",))
        plan[tune_name] = _PlannedTensor(gguf_name, tuple(parameter.shape), encoding, num_bytes, offset)
        offset += gguf.GGUFWriter.ggml_pad(num_bytes, gguf.GGUF_DEFAULT_ALIGNMENT)
    for name, divisors_P in _rope_tensors(shape):
        plan[name] = _PlannedTensor(name, tuple(divisors_P.shape), encodings.F32, 4 * len(divisors_P), offset)
    return plan


def _rope_tensors(shape: LlamaShape) -> Iterator[tuple[str, Tensor]]:
    """What rotary frequencies are divided by is a tensor of the file, unless one factor says it."""
    if shape.rope_scaling is not None and shape.rope_scaling.kind == "llama3":
        yield "rope_freqs.weight", rope_frequency_divisors_P(shape)


def _encoded_rows(gguf: ModuleType, tensor: Tensor, planned: _PlannedTensor, tune_name: str) -> Iterator[np.ndarray]:
    """A tensor as the file holds it, a part of its rows at a time.

    Raises:
        UserError: a value is not finite, or is beyond what f16, of the value or of its block's scale, can hold.
    """
    encodings = gguf.GGMLQuantizationType
    largest_f16 = float(np.finfo(np.float16).max)
    limit = {encodings.F32: np.inf, encodings.F16: largest_f16, encodings.Q8_0: 127 * largest_f16}[planned.encoding]
    for rows in tensor.detach().split(_NUM_ROWS_AT_A_TIME):
        values = rows.cpu().contiguous()
        lowest, highest = torch.aminmax(values)
        if not max(-lowest.item(), highest.item()) <= limit:  # so written, it refuses NaN as well
            raise UserError(
                f"quantization: {tune_name} holds values that are not finite or too large for {planned.encoding.name}; "
                "merge to another format"
            )
        if planned.encoding == encodings.F16:
            yield values.half().numpy()  # torch is twice as fast at it as numpy
        else:
            yield gguf.quants.quantize(values.float().numpy(), planned.encoding)
