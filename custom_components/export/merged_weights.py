"""A checkpoint's weights with adapters merged into them, one tensor at a time, in fp32.

LoRA and rsLoRA: W' = W + s B A; DoRA: W' = m (W + s B A) / ||W + s B A||, by rows; see :mod:`lora` for the papers.
Several adapters with weights c: W' = W + the sum of c (W'_of_each - W), the linear combination of Ilharco et al. 2022,
arXiv 2212.04089, section 2.

Dimensions: `I` in_dim, `O` out_dim.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from custom_components.models.llama import lora_llama
from custom_components.models.lora import FrozenLinear, LoRALinear, adapter_modules, merged_weight
from custom_components.models.quantization import Quantization, dequantize, quantize
from custom_components.models.shapes import LlamaShape
from custom_components.models.token_rows import TokenRows, token_rows
from custom_components.runtime.errors import UserError
from custom_components.weights.adapted_model import model_for_adapter
from custom_components.weights.adapter_files import StoredAdapter
from custom_components.weights.adapters import load_adapter
from custom_components.weights.checkpoint_files import BaseCheckpoint
from custom_components.weights.checkpoint_loading import check_base_weights

EMBEDDING = "tok_embeddings.weight"
OUTPUT_HEAD = "output.weight"


class BaseWeights:
    """The weights of a checkpoint, read one at a time under torchtune's names and in its row order.

    Args:
        checkpoint: the base.
        num_embeddings: rows of embedding and head, with those of new tokens: the mean of the others. None: the
            checkpoint's.
        quantization: give the linear weights that training quantized to this format after a round trip, the values
            training used; None: as they are stored.

    Attributes:
        model: the model without adapters, on the meta device.
        shapes: of every tensor, in the order in which they are stored.

    Raises:
        UserError: the checkpoint is incomplete.
    """

    def __init__(
        self, checkpoint: BaseCheckpoint, quantization: Quantization | None = None, num_embeddings: int | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.quantization = quantization
        num_before = checkpoint.shape.vocab_size
        self.shape: LlamaShape = replace(checkpoint.shape, vocab_size=num_embeddings or num_before)
        with torch.device("meta"):
            self.model: TransformerDecoder = lora_llama(self.shape, lora_attn_modules=[], quantization=quantization)
        self._sources = check_base_weights(self.model, checkpoint, self.shape.vocab_size - num_before)
        self.shapes = {name: source.shape for name, source in self._sources.items()}

    @property
    def stored_dtype(self) -> torch.dtype:
        """Give the embedding's dtype: checkpoints store all their matrices in one."""
        return self._sources[EMBEDDING].read().dtype

    def read(self, name: str) -> Tensor:
        """Read a tensor in its stored dtype, or in fp32 where it was quantized; the head of a tied model too.

        It may be a view of the file's memory map: not to be changed in place.
        """
        if name == OUTPUT_HEAD and self.shape.tied_embeddings:
            name = EMBEDDING
        value = self._sources[name].read()
        module = self.model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, FrozenLinear) and module.quantization is not None:
            return dequantize(quantize(value, module.quantization), torch.float32)
        return value


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter without its base: each module's trained parameters on the CPU, the frozen weight on meta.

    Attributes:
        weight: the factor of its change to the weights.
        modules: by torchtune's module name.
        token_rows: trained rows, by the name of the module whose they are.
        num_embeddings: rows of embedding and head of the model that the adapter was trained on.
    """

    directory: Path
    weight: float
    modules: dict[str, LoRALinear]
    token_rows: dict[str, TokenRows]
    num_embeddings: int

    @property
    def digest(self) -> str:
        """Hash the tensors: equal for equal adapters, wherever they are and in whatever format."""
        contents = hashlib.sha256()
        for name, module in sorted(self.modules.items()):
            contents.update(name.encode())
            for parameter in module.adapter_params():
                contents.update(module.get_parameter(parameter).detach().contiguous().numpy().tobytes())
        for name, rows in sorted(self.token_rows.items()):
            contents.update(f"{name} {rows.token_ids.tolist()}".encode())
            contents.update(rows.rows.detach().contiguous().numpy().tobytes())
        return contents.hexdigest()


def read_adapter(base: BaseCheckpoint, stored: StoredAdapter, weight: float = 1.0) -> MergedAdapter:
    """Read an adapter of a checkpoint's model, without reading the base weights.

    Raises:
        UserError: an adapter of another model, or not finite.
    """
    model = model_for_adapter(base, stored)
    modules = adapter_modules(model)
    for module in modules.values():
        module.allocate_adapter(torch.device("cpu"))
    rows_of_tokens = token_rows(model)
    for rows in rows_of_tokens.values():
        rows.allocate(torch.device("cpu"))
    load_adapter(model, stored)
    return MergedAdapter(stored.directory, weight, modules, rows_of_tokens, model.tok_embeddings.num_embeddings)


def num_embeddings_of(base: BaseCheckpoint, adapters: Sequence[MergedAdapter]) -> int:
    """Count the rows of embedding and head of a model that has all of the adapters.

    Raises:
        UserError: two of them have rows of tokens, whose ids may mean different tokens.
    """
    if len([adapter for adapter in adapters if adapter.token_rows]) > 1:
        raise UserError("adapters: more than one of them has trained rows of tokens; merge them one after the other")
    return max([base.shape.vocab_size, *(adapter.num_embeddings for adapter in adapters)])


def with_token_rows(name: str, value: Tensor, adapters: Sequence[MergedAdapter], *, is_tied: bool) -> Tensor:
    """Put adapters' trained rows into an embedding's or a head's weight, in fp32; other weights are returned as given.

    Args:
        is_tied: of the base. The embedding's rows are then the head's too, unless it has its own.
    """
    for adapter in adapters:
        rows_of_tokens = adapter.token_rows
        matrix = name.removesuffix(".weight")
        if is_tied and matrix == "output" and matrix not in rows_of_tokens:
            matrix = "tok_embeddings"
        if (rows := rows_of_tokens.get(matrix)) is not None and len(rows.token_ids):
            value = value.float().clone()
            value[rows.token_ids] += adapter.weight * (rows.rows.detach() - value[rows.token_ids])
    return value


class MergedWeights:
    """A base's weights with adapters merged in, read one at a time as those of :class:`BaseWeights`.

    Attributes:
        shape: of the merged model. An adapter on a head that was the base's embedding makes two weights of them.
        shapes: of every tensor.
    """

    def __init__(self, base: BaseWeights, adapters: Sequence[MergedAdapter]) -> None:
        self._base = base
        self._adapters = adapters
        self.shapes = dict(base.shapes)
        self.shape = base.shape
        if base.shape.tied_embeddings and any("output" in {**a.modules, **a.token_rows} for a in adapters):
            self.shapes[OUTPUT_HEAD] = base.shapes[EMBEDDING]
            self.shape = replace(base.shape, tied_embeddings=False)

    @property
    def num_values(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def read(self, name: str) -> Tensor:
        """Read a tensor: in fp32 where an adapter changes it, else as the base gives it."""
        module_name = name.removesuffix(".weight")
        changes = [
            (adapter.weight, adapter.modules[module_name])
            for adapter in self._adapters
            if module_name in adapter.modules
        ]
        is_tied = self._base.shape.tied_embeddings
        value = with_token_rows(name, self._base.read(name), self._adapters, is_tied=is_tied)
        return merged_weight(value, changes) if changes else value

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor by name, in the order of `shapes`."""
        for name in self.shapes:
            yield name, self.read(name)
