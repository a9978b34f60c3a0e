"""Streaming base weights onto a model that was built on the meta device."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torchtune.modules import RMSNorm, TransformerDecoder
from torchtune.modules.peft import get_adapter_params
from tqdm import tqdm

from custom_components.distributed.sharding import LayerShards
from custom_components.models import quantization
from custom_components.models.lora import FrozenLinear, LoRALinear, adapter_modules
from custom_components.models.quantization import Quantization
from custom_components.models.shapes import LlamaShape
from custom_components.models.token_rows import HeadWithTokenRows, added_rows, token_rows
from custom_components.models.trained import TokenEmbedding
from custom_components.runtime.devices import NUM_LOADING_THREADS
from custom_components.runtime.errors import UserError
from custom_components.weights.checkpoint_files import BaseCheckpoint, StoredTensor
from custom_components.weights.quantized_cache import QuantizedCache


def load_base_weights(
    model: TransformerDecoder,
    base: BaseCheckpoint,
    dtype: torch.dtype,
    device: torch.device,
    quantized_cache_dir: Path | None = None,
    trained_dtype: torch.dtype | None = None,
    shards: LayerShards | None = None,
) -> None:
    """Give a model on the meta device its base's weights, and its adapters their initial values, in place.

    Each tensor is read, brought to torchtune's row order, quantized or cast once, and dropped: beside the model there
    are never more than a few weights in memory. Adapters are drawn from torch's global generator, on the CPU, so that
    they are the same on every device.

    Args:
        model: of `lora_llama`, `full_llama` or a named builder, built under `torch.device("meta")`.
        dtype: of the weights that are not quantized, and of products with those that are.
        quantized_cache_dir: where quantized weights are kept for the next start, see :class:`QuantizedCache`; None:
            nowhere.
        trained_dtype: of the base's weights that are trained; None: `dtype`.
        shards: that this process and others keep of the layers: each tensor is read by one of them, and no process
            holds more than a layer beside its share. None: this process keeps all.

    Raises:
        UserError: before the first weight is read, if the checkpoint is incomplete or of another model.
    """
    sources = check_base_weights(model, base)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps = base.shape.norm_eps  # Llama 2's chat models state another than the base models

    format = quantization_of(model)
    quantized = {
        f"{name}.weight": module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, FrozenLinear) and module.quantize_base
    }
    newly_quantized: list[str] = []
    cache = cached = None
    if quantized_cache_dir is not None and format is not None:
        cache = QuantizedCache(quantized_cache_dir, base, format)
        cached = cache.weights(quantized, dtype, device)

    def load(name: str, is_read_here: bool = True) -> None:
        module_name, _, parameter_name = name.rpartition(".")
        module = model.get_submodule(module_name)
        shape, is_trained = model.get_parameter(name).shape, model.get_parameter(name).requires_grad
        value: Tensor | None
        if format is not None and name in quantized and not is_read_here:
            value = quantization.empty(shape, format, dtype, device)
        elif format is not None and name in quantized:
            value = None if cached is None else cached.read(name, shape)
            if value is None:
                value = quantization.quantize(sources[name].read().to(device), format, dtype)
                newly_quantized.append(name)
        else:
            # Norms stay in fp32, the dtype they compute in.
            # note: copy, or the parameter is a view of the file's memory map and changes with the file.
            weight_dtype = (trained_dtype or dtype) if is_trained else dtype
            stored_dtype = torch.float32 if isinstance(module, RMSNorm) else weight_dtype
            if is_read_here:
                value = sources[name].read().to(device, stored_dtype, copy=True)
            else:
                value = torch.empty(shape, dtype=stored_dtype, device=device)
        setattr(module, parameter_name, nn.Parameter(value, requires_grad=is_trained))

    with ThreadPoolExecutor(NUM_LOADING_THREADS) as threads, torch.no_grad():
        # note: gone through one by one, so that an error in a thread is raised here.
        names = [name for name in sources if shards is None or not name.startswith("layers.")]
        for _ in tqdm(
            threads.map(load, names), "loading", len(names), unit="tensor", leave=False, delay=1, disable=None
        ):
            pass
    if cache is not None and newly_quantized:
        if cached is not None:
            cache.say_damaged()
        cache.store({name: model.get_parameter(name).data for name in quantized})
    if isinstance(model.output, LoRALinear | HeadWithTokenRows) and base.shape.tied_embeddings:
        model.output.weight = model.tok_embeddings.weight
    if isinstance(model.tok_embeddings, TokenEmbedding):
        model.tok_embeddings.compute_dtype = dtype
    for name, rows in token_rows(model).items():
        rows.initialize(model.get_parameter(f"{name}.weight"))
    if shards is not None:
        _load_shards(model, [*sources], load, shards, device)
    for name, module in adapter_modules(model).items():
        if shards is None or not name.startswith("layers."):
            module.initialize_adapter(device)
    model.to(device)  # the rest: rope's cache


def _load_shards(
    model: TransformerDecoder,
    names: Sequence[str],
    load: Callable[[str, bool], None],
    shards: LayerShards,
    device: torch.device,
) -> None:
    """Load layer after layer, with its adapters, and keep a share of each.

    Args:
        names: of the base's weights.
        load: gives the model a weight, with or without its values.
    """
    for index, layer in enumerate(tqdm(model.layers, "loading", unit="layer", leave=False, delay=1, disable=None)):
        of_layer = [name for name in names if name.startswith(f"layers.{index}.")]
        with torch.no_grad():
            for number, name in enumerate(of_layer):
                load(name, shards.is_read_here(number))
                shards.broadcast(number, model.get_parameter(name).data)
        for module in adapter_modules(layer).values():
            module.initialize_adapter(device)
        shards.shard(layer)


def check_base_weights(
    model: TransformerDecoder, base: BaseCheckpoint, num_added_rows: int | None = None
) -> dict[str, StoredTensor]:
    """Give the tensors on disk for every parameter of `model` that is its base's, if they are all there.

    Rows of new tokens, which embedding and head have beyond those on disk, are the mean of the matrix's other rows.

    Args:
        num_added_rows: rows of new tokens; None: as the model says.

    Raises:
        UserError: the checkpoint is incomplete or of another model. No weight has been read; one that is not finite
            is refused when it is.
    """
    num_added_rows = added_rows(model) if num_added_rows is None else num_added_rows
    _check_same_model(model, base, num_added_rows)
    sources = _with_tied_embeddings(base.tensors, base.shape)
    if num_added_rows:
        embeddings = {name: sources[name] for name in ("tok_embeddings.weight", "output.weight") if name in sources}
        sources = sources | {name: _with_mean_rows(source, num_added_rows) for name, source in embeddings.items()}
    of_adapters = get_adapter_params(model)
    base_names = [name for name, _ in model.named_parameters() if name not in of_adapters]
    _check_tensors(model, base_names, sources, base.directory)
    return {name: _checked_when_read(source) for name, source in sources.items()}


def quantization_of(model: TransformerDecoder) -> Quantization | None:
    """Tell which format the frozen linear weights are kept in; None: the compute dtype."""
    formats = [module.quantization for module in model.modules() if isinstance(module, FrozenLinear)]
    return next((format for format in formats if format is not None), None)


def base_format(model: TransformerDecoder) -> str | None:
    """Give the format of a quantized base in words; None: it is not quantized."""
    format = quantization_of(model)
    return None if format is None else quantization.WORDS[format]


def unquantized_modules(model: TransformerDecoder) -> list[str]:
    """List the layers' linear weights that stay in the compute dtype, because NF4's blocks do not divide them."""
    return [
        name
        for name, module in model.layers.named_modules()
        if isinstance(module, FrozenLinear) and not module.quantize_base
    ]


def _check_same_model(model: TransformerDecoder, base: BaseCheckpoint, num_added_rows: int) -> None:
    """Compare what tensor shapes do not show: with other heads or another rotary base a model loads and is wrong."""
    attention = model.layers[0].attn
    built = {
        "num_layers": len(model.layers),
        "num_heads": model.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "rope_base": attention.pos_embeddings.base,
        "rope_scaling": attention.pos_embeddings.scaling,
        "vocab_size": model.tok_embeddings.num_embeddings - num_added_rows,
    }
    for name, value in built.items():
        if value != (stated := getattr(base.shape, name)):
            raise UserError(
                f"checkpoint_dir: {str(base.directory)!r} has {name} {stated}, the config's model "
                f"has {value}; in model._component_ name its builder or custom_components.models.lora_llama_from_config"
            )


def _with_tied_embeddings(sources: dict[str, StoredTensor], shape: LlamaShape) -> dict[str, StoredTensor]:
    """Give tied checkpoints' one weight the embedding's name: it is stored under either name, or both.

    Raises:
        UserError: when it is read, if both are there and differ.
    """
    if not shape.tied_embeddings or "output.weight" not in sources:
        return sources
    sources = dict(sources)
    head = sources.pop("output.weight")
    embedding = sources.setdefault("tok_embeddings.weight", head)

    def read() -> Tensor:
        value = embedding.read()
        if not torch.equal(value, head.read()):
            raise UserError(
                f"checkpoint_dir: config.json says tie_word_embeddings, but {head.stored_name} in {head.file} differs "
                f"from {embedding.stored_name}; set tie_word_embeddings to false there, as transformers takes it"
            )
        return value

    if embedding is not head:
        sources["tok_embeddings.weight"] = replace(embedding, read=read)
    return sources


def _with_mean_rows(source: StoredTensor, num_rows: int) -> StoredTensor:
    """Append rows that are the mean of all, in fp64, as transformers' `resize_token_embeddings` centres new rows."""

    def read() -> Tensor:
        value = source.read()
        total = torch.stack([rows.double().sum(dim=0) for rows in value.split(4096)]).sum(dim=0)
        mean = (total / len(value)).to(value.dtype)
        return torch.cat([value, mean.expand(num_rows, -1)])

    return replace(source, shape=(source.shape[0] + num_rows, *source.shape[1:]), read=read)


def _checked_when_read(source: StoredTensor) -> StoredTensor:
    """Refuse values that are not finite, which would make every answer nonsense, where the tensor is read."""

    def read() -> Tensor:
        value = source.read()
        if value.is_floating_point() and value.element_size() > 1:
            # note: a NaN makes both NaN. Three times as fast as reading the file, and no copy.
            lowest, highest = torch.aminmax(value)
            if not (lowest.isfinite() and highest.isfinite()):
                raise UserError(
                    f"checkpoint_dir: {source.stored_name} in {source.file} holds values that are not finite; the "
                    "checkpoint is damaged: download it again"
                )
        return value

    return replace(source, read=read)


def _check_tensors(
    model: TransformerDecoder, names: list[str], sources: dict[str, StoredTensor], checkpoint_dir: Path
) -> None:
    problems = [f"{name} is missing" for name in names if name not in sources]
    problems += [f"{source.stored_name} is not of this model" for name, source in sources.items() if name not in names]
    for name in names:
        expected = tuple(model.get_parameter(name).shape)
        if name in sources and sources[name].shape != expected:
            problems.append(f"{sources[name].stored_name} has shape {sources[name].shape}, the model {expected}")
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise UserError(f"checkpoint_dir: {str(checkpoint_dir)!r} does not hold this model: {listed}")


def frozen_checksum(model: TransformerDecoder) -> str:
    """Hash every byte of the frozen parameters, quantized ones as they are stored."""
    checksum = hashlib.sha256()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            for tensor in quantization.stored_tensors(parameter.data):
                checksum.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return checksum.hexdigest()
