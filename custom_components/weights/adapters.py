"""Adapters on disk: written in PEFT's format, read in PEFT's and torchtune's."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torchtune.modules import TiedLinear, TransformerDecoder

from custom_components.models.linear_names import hugging_face_module
from custom_components.models.lora import FrozenLinear, LoRALinear, adapter_modules
from custom_components.models.token_rows import token_rows
from custom_components.runtime.atomic_files import whole_directory
from custom_components.runtime.errors import UserError
from custom_components.runtime.terminal import say
from custom_components.weights.adapter_files import WEIGHTS_NAME, StoredAdapter, rope_heads
from custom_components.weights.adapter_settings import adapter_settings, target_names
from custom_components.weights.names import halve_rope_rows
from custom_components.weights.peft_format import (
    ADAPTER_CONFIG_NAME,
    BASE_WEIGHTS,
    TOKEN_ROWS,
    peft_module,
    peft_rows_key,
)
from custom_components.weights.stored_token_rows import (
    num_checkpoint_rows,
    read_token_rows,
    token_rows_problems,
    tokens_left_out,
)


def save_adapter(
    model: TransformerDecoder,
    adapter_dir: Path,
    base_model: str,
    texts: Mapping[str, str],
) -> None:
    """Write the model's adapter, whole or not at all.

    Args:
        adapter_dir: replaced if it exists.
        base_model: what PEFT's users load the adapter on: a name on the hub, or a directory.
        texts: files to write beside the weights, the prompt format and the card for example: content by file name.
    """
    settings = adapter_settings(model)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": sorted(settings.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        **settings.peft_entries,
    }
    num_kv_heads = model.layers[0].attn.num_kv_heads
    tensors = {}
    for module_name, module in adapter_modules(model).items():
        for parameter, peft_name in module.peft_names.items():
            num_heads = rope_heads(f"{module_name}.{parameter}", model.num_heads, num_kv_heads)
            tensor = module.exported(parameter)
            rows = tensor if num_heads is None else halve_rope_rows(tensor, num_heads)
            tensors[f"{peft_module(module_name)}.{peft_name}"] = rows.detach().cpu().contiguous()
    for matrix, token_matrix in token_rows(model).items():
        if len(token_matrix.token_ids):
            tensors[peft_rows_key(matrix)] = token_matrix.rows.detach().cpu().contiguous()
    with whole_directory(adapter_dir) as directory:
        (directory / ADAPTER_CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8")


def load_adapter(model: TransformerDecoder, stored: StoredAdapter) -> None:
    """Give the model's adapters the values of an adapter on disk, PEFT's or torchtune's, in place.

    Raises:
        UserError: see :func:`check_adapter_fits` and :func:`copy_into_adapter`.
    """
    copy_into_adapter(model, check_adapter_fits(model, stored))


def copy_into_adapter(model: TransformerDecoder, tensors: Mapping[str, Tensor]) -> None:
    """Give the model's adapters the values that :func:`check_adapter_fits` returned, in place.

    Args:
        model: with its frozen weights loaded, or of :func:`model_for_adapter`.

    Raises:
        UserError: the adapter brings embeddings or an output head other than the model's.
    """
    parameters = dict(model.named_parameters())
    of_adapters = {
        f"{name}.{parameter}": (module, parameter)
        for name, module in adapter_modules(model).items()
        for parameter in module.adapter_params()
    }
    num_rows = num_checkpoint_rows(model)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in of_adapters:
                module, parameter = of_adapters[name]
                module.load_exported(parameter, tensor)
            elif name in parameters and parameters[name].requires_grad:
                parameters[name].copy_(tensor)
            elif not (base_weight := _base_weight(model, name)).is_meta:
                check_same_base(name, tensor, base_weight, num_rows)


def check_adapter_fits(model: TransformerDecoder, stored: StoredAdapter) -> dict[str, Tensor]:
    """Read an adapter's tensors, by the names of the model's parameters, if they are those of `model`.

    The config is held against the model as well: with another scaling the same tensors are another adapter.

    Args:
        model: may be on the meta device.

    Raises:
        UserError: another rank, scaling or targets; missing, unexpected, misshapen or not finite tensors, by name.
    """
    problems = _problems_of_settings(model, stored) or _problems_of_tensors(model, stored)
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        listed = "; ".join(problems[:5]) + more
        raise UserError(f"the adapter {str(stored.directory)!r} does not fit this model: {listed}")
    num_kv_heads = model.layers[0].attn.num_kv_heads
    tensors = {
        name: stored.read(name, model.num_heads, num_kv_heads)
        for name in stored.tensors
        if not name.endswith(TOKEN_ROWS)
    }
    for matrix, rows in token_rows(model).items():
        if len(rows.token_ids):
            tensors[f"{matrix}.{TOKEN_ROWS}"] = read_token_rows(stored, matrix, rows.token_ids.tolist())
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        key = stored.tensors[broken[0]].stored_name if broken[0] in stored.tensors else stored.key(broken[0])
        raise UserError(f"the adapter {str(stored.directory)!r}: {key} is not finite; train it again")
    if left_out := tokens_left_out(model, stored):
        say(f"{stored.directory}: its vocabulary has new tokens, {left_out}, that nothing trained: left out")
    changing = (".lora_b.weight", ".magnitude", TOKEN_ROWS)
    if not any(tensor.any() for name, tensor in tensors.items() if name.endswith(changing)):
        say(f"warning: the adapter {str(stored.directory)!r} changes nothing: every B is zero", sys.stderr)
    return tensors


def check_adapter_was_trained(model: TransformerDecoder) -> None:
    """Refuse an adapter that changes nothing.

    Raises:
        UserError: every B is zero, or a value is not finite.
    """
    modules = adapter_modules(model)
    if not any(module.has_learned() for module in modules.values()):
        raise UserError(
            "optimizer.lr: every B of the adapter is still zero, or what PiSSA began with, so nothing was learned; "
            "raise the learning rate"
        )
    rows_not_finite = [name for name, rows in token_rows(model).items() if not rows.rows.isfinite().all()]
    if broken := [*modules_not_finite(modules), *rows_not_finite]:
        raise UserError(f"optimizer.lr: the adapter of {broken[0]} is not finite; lower the learning rate")


def modules_not_finite(modules: Mapping[str, LoRALinear]) -> list[str]:
    """List the modules whose adapter has a NaN or an infinite value."""
    return [
        name
        for name, module in modules.items()
        if not all(module.get_parameter(parameter).isfinite().all() for parameter in module.adapter_params())
    ]


def _problems_of_settings(model: TransformerDecoder, stored: StoredAdapter) -> list[str]:
    """Find another rank, scaling or targets: the common cause when many tensors do not fit."""
    if not adapter_modules(model):
        return ["the model has no adapters"]
    built, config = adapter_settings(model), stored.config
    targets = sorted(target_names(stored.modules)), sorted(target_names(adapter_modules(model)))
    settings = {
        "use_rslora": (config.use_rslora, "use_rslora" in built.flags),
        "use_dora": (stored.use_dora, "use_dora" in built.flags),
        "target_modules": targets,
    }
    return [
        *_different_sizes("lora_rank", config.rank_of, lambda module: module.exported_rank, model, stored),
        *_different_sizes("lora_alpha", config.alpha_of, lambda module: module.exported_alpha, model, stored),
        *(f"{key} is {theirs}, the model's {ours}" for key, (theirs, ours) in settings.items() if theirs != ours),
    ]


def _different_sizes(
    key: str,
    size_of: Callable[[str], float],
    built_size: Callable[[LoRALinear], float],
    model: TransformerDecoder,
    stored: StoredAdapter,
) -> list[str]:
    """Compare a size of the layers that have an adapter in both, by name where they do not all differ alike."""
    sizes = {
        hugging_face_module(name): (size_of(hugging_face_module(name)), built_size(module))
        for name, module in adapter_modules(model).items()
        if name in stored.modules
    }
    different = {name: pair for name, pair in sizes.items() if pair[0] != pair[1]}
    if different and len({*sizes.values()}) == 1:
        [(theirs, ours)] = {*sizes.values()}
        return [f"{key} is {theirs}, the model's {ours}"]
    return [f"{key} of {name} is {theirs}, the model's {ours}" for name, (theirs, ours) in different.items()]


def _problems_of_tensors(model: TransformerDecoder, stored: StoredAdapter) -> list[str]:
    expected = {
        f"{name}.{parameter}": tuple(module.exported(parameter).shape)
        for name, module in adapter_modules(model).items()
        for parameter in module.adapter_params()
    }
    brought = {name: tuple(_base_weight(model, name).shape) for name in stored.base_weights}
    problems = [f"{stored.key(name)} is missing" for name in expected if name not in stored.tensors]
    problems += token_rows_problems(model, stored)
    for name, tensor in stored.tensors.items():
        if name.endswith(TOKEN_ROWS):
            continue
        shape = (expected | brought).get(name)
        if shape is None:
            problems.append(f"{tensor.stored_name} has no place in the model")
        elif tensor.shape != shape and not (name in BASE_WEIGHTS and tensor.shape[1:] == shape[1:]):
            problems.append(f"{tensor.stored_name} has shape {tensor.shape}, the model {shape}")
    linears = [name for name, module in model.named_modules() if isinstance(module, FrozenLinear)]
    targeted = {name for name in linears if stored.config.targets(hugging_face_module(name))}
    problems += [
        f"{hugging_face_module(name)} is " + ("one of" if name in targeted else "none of") + " its target_modules and "
        f"has {'no' if name in targeted else 'a'} tensor"
        for name in linears
        if (name in targeted) != (name in stored.modules)
    ]
    return problems


def check_same_base(name: str, of_adapter: Tensor, of_model: Tensor, num_checkpoint_rows: int) -> None:
    """Compare a weight that an adapter brings along with the base's.

    Args:
        num_checkpoint_rows: of an embedding, those that the checkpoint has. Of an adapter with a resized vocabulary
            the rows that both have are compared.

    Raises:
        UserError: they are not the same.
    """
    num_rows = len(of_model) if name not in BASE_WEIGHTS else min(len(of_adapter), num_checkpoint_rows)
    # note: equal up to a rounding to bfloat16 on either side. Anything else is another base model.
    if of_adapter.shape[1:] != of_model.shape[1:] or not torch.allclose(
        of_model[:num_rows].cpu().float(), of_adapter[:num_rows].float(), rtol=2**-8, atol=1e-6
    ):
        raise UserError(
            f"the adapter holds the {name} of its base model, and it is not checkpoint_dir's: it was trained on "
            "another model, or with changed embeddings; name that model. Embeddings that were trained whole, by "
            "modules_to_save, cannot be loaded; here single tokens are trained, by trainable_tokens"
        )


def _base_weight(model: TransformerDecoder, name: str) -> Tensor:
    if name == "output.weight" and isinstance(model.output, TiedLinear):
        name = "tok_embeddings.weight"
    return model.get_parameter(name)
