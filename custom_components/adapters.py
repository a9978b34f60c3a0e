"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors.

Format: huggingface/peft, src/peft/utils/save_and_load.py (key names) and src/peft/tuners/lora/config.py (config). What
PEFT's config has no place for, the prompt format the adapter was trained with, is in a file of its own.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchtune.models.convert_weights import _FROM_HF
from torchtune.modules import TransformerDecoder

from custom_components.atomic_files import whole_directory
from custom_components.builders import ATTENTION_MODULES, lora_llama_from_config
from custom_components.checkpoint_files import halve_rope_rows, interleave_rope_rows
from custom_components.checkpoint_loading import load_base_weights
from custom_components.errors import UserError
from custom_components.lora import LoRALinear

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PROMPT_FORMAT_NAME = "prompt_format.yaml"

_HF_NAMES = {tune: hf for hf, tune in _FROM_HF.items() if tune is not None}
_PEFT_TARGETS = {
    **{"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "output_proj"},
    **{"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "lm_head": "output"},
}


_VARIANTS = ("use_rslora", "use_dora")  # named alike by PEFT, the builders and LoRALinear


@dataclass(frozen=True)
class PromptFormat:
    """How the prompts looked that an adapter was trained on, and the tokens that end an answer."""

    prompt_template: str | dict[str, str]
    system_prompt: str | None
    stop_tokens: list[str]


def adapter_modules(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's modules with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def save_adapter(model: TransformerDecoder, adapter_dir: Path, base_model: str, prompt_format: PromptFormat) -> None:
    """Write the model's adapter, whole or not at all.

    Args:
        adapter_dir: replaced if it exists.
        base_model: what PEFT's users load the adapter on: a name on the hub, or a directory.
    """
    modules = adapter_modules(model)
    first = next(iter(modules.values()))
    targets = sorted({name.rpartition(".")[2] for name in modules})
    peft_names = {tune: peft for peft, tune in _PEFT_TARGETS.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "target_modules": [peft_names[target] for target in targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        **{key: True for key in _VARIANTS if getattr(first, key)},
    }
    with whole_directory(adapter_dir) as directory:
        (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(_peft_tensors(model), directory / WEIGHTS_NAME, metadata={"format": "pt"})
        (directory / PROMPT_FORMAT_NAME).write_text(
            yaml.safe_dump(vars(prompt_format), sort_keys=False, allow_unicode=True), encoding="utf-8"
        )


def load_adapter(model: TransformerDecoder, adapter_dir: Path) -> None:
    """Give the model's adapters the values of a PEFT directory, in place.

    Raises:
        UserError: missing, unexpected or misshapen tensors, by name; another scaling; a damaged file.
    """
    copy_into_adapter(model, check_adapter_fits(model, adapter_dir))


def copy_into_adapter(model: TransformerDecoder, stored: dict[str, Tensor]) -> None:
    """Give the model's adapters the values that :func:`check_adapter_fits` returned, in place."""
    with torch.no_grad():
        for key, num_heads, tensor in _peft_keys(model):
            tensor.copy_(stored[key] if num_heads is None else interleave_rope_rows(stored[key], num_heads))


def check_adapter_fits(model: TransformerDecoder, adapter_dir: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file, if they are those that `model`, which may be on the meta device, has.

    The config is held against the model as well: with another scaling the same tensors are another adapter.

    Raises:
        UserError: see :func:`load_adapter`.
    """
    settings = lora_settings(adapter_dir)
    path = adapter_dir / WEIGHTS_NAME
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None
    expected = {key: tensor.shape for key, _, tensor in _peft_keys(model)}
    built = next(iter(adapter_modules(model).values()), None)
    stated = {"lora_alpha": built.alpha, **{key: getattr(built, key) for key in _VARIANTS}} if built else {}
    problems = [
        f"{key} is {settings[key]}, the model's {value}" for key, value in stated.items() if settings[key] != value
    ]
    problems += [f"{key} is missing" for key in expected if key not in stored]
    problems += [f"{key} has no place in the model" for key in stored if key not in expected]
    problems += [
        f"{key} has shape {tuple(stored[key].shape)}, the model {tuple(shape)}"
        for key, shape in expected.items()
        if key in stored and stored[key].shape != shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"adapter_dir: {str(adapter_dir)!r} does not fit this model: {'; '.join(problems[:5])}{more}")
    return stored


def lora_settings(adapter_dir: Path) -> dict[str, Any]:
    """The builder's arguments that an adapter was made with, of its adapter_config.json.

    Raises:
        UserError: no adapter there, or one of a kind that is not built here.
    """
    path = adapter_dir / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        targets, rank, alpha = set(config["target_modules"]), config["r"], config["lora_alpha"]
    except FileNotFoundError:
        raise UserError(f"adapter_dir: {str(adapter_dir)!r} has no {CONFIG_NAME}; name the adapter/ of a run") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a LoRA adapter's config ({type(error).__name__}: {error})") from None
    unsupported = [key for key in ("rank_pattern", "alpha_pattern", "modules_to_save") if config.get(key)]
    mlp_targets = targets & {"gate_proj", "up_proj", "down_proj"}
    if len(mlp_targets) not in (0, 3):
        unsupported.append(f"target_modules with {sorted(mlp_targets)} but not all three of the feed-forward")
    if unknown := targets - set(_PEFT_TARGETS):
        unsupported.append(f"target_modules {sorted(unknown)}")
    if unsupported:
        raise UserError(f"{path}: {'; '.join(unsupported)} cannot be built here")
    return {
        "lora_attn_modules": [name for name in ATTENTION_MODULES if name in {_PEFT_TARGETS[t] for t in targets}],
        "apply_lora_to_mlp": bool(mlp_targets),
        "apply_lora_to_output": "lm_head" in targets,
        "lora_rank": rank,
        "lora_alpha": alpha,
        **{key: bool(config.get(key)) for key in _VARIANTS},
    }


def load_model_for_inference(
    checkpoint_dir: Path, adapter_dir: Path | None, quantize_base: bool, dtype: torch.dtype, device: torch.device
) -> TransformerDecoder:
    """A checkpoint's model, with an adapter where one is named, ready to answer.

    Raises:
        UserError: a checkpoint or adapter that is not there, not whole, or not of each other.
    """
    lora = lora_settings(adapter_dir) if adapter_dir else {"lora_attn_modules": []}
    with torch.device("meta"):
        model = lora_llama_from_config(checkpoint_dir, quantize_base=quantize_base, **lora)
    if adapter_dir:
        check_adapter_fits(model, adapter_dir)
    load_base_weights(model, checkpoint_dir, dtype, device)
    if adapter_dir:
        load_adapter(model, adapter_dir)
    return model.eval()


def read_prompt_format(adapter_dir: Path) -> PromptFormat | None:
    """The prompt format of an adapter, or None where another tool made it and it says none."""
    path = adapter_dir / PROMPT_FORMAT_NAME
    if not path.exists():
        return None
    try:
        return PromptFormat(**yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError) as error:
        raise UserError(f"{path}: not a prompt format ({error})") from None


def base_model_name(checkpoint_dir: Path) -> str:
    """The hub name of a downloaded checkpoint, which `tune download` leaves beside it, else the directory."""
    try:
        return json.loads((checkpoint_dir / "original_repo_id.json").read_text(encoding="utf-8"))["repo_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return str(checkpoint_dir)


def check_adapter_was_trained(model: nn.Module) -> None:
    """Refuse an adapter that changes nothing.

    Raises:
        UserError: every B is zero, or a value is not finite.
    """
    modules = adapter_modules(model)
    if not any(module.lora_b.weight.any() for module in modules.values()):
        raise UserError(
            "optimizer.lr: every B of the adapter is still zero, nothing was learned; raise the learning rate"
        )
    broken = [
        name
        for name, module in modules.items()
        if not all(module.get_parameter(parameter).isfinite().all() for parameter in module.adapter_params())
    ]
    if broken:
        raise UserError(f"optimizer.lr: the adapter of {broken[0]} is not finite; lower the learning rate")


def _peft_keys(model: TransformerDecoder) -> list[tuple[str, int | None, Tensor]]:
    """PEFT's key, the heads whose rows are to be permuted (or None), and the parameter, for every adapter tensor."""
    num_kv_heads = model.layers[0].attn.num_kv_heads
    keys: list[tuple[str, int | None, Tensor]] = []
    for name, module in adapter_modules(model).items():
        layer = name.split(".")[1] if name.startswith("layers.") else ""
        pattern = name.replace(f".{layer}.", ".{}.", 1) if layer else name
        hf_module = _HF_NAMES[f"{pattern}.weight"].format(layer).removesuffix(".weight")
        # B is permuted, and the magnitude: their rows are those of q and k, A's columns are the hidden state's.
        num_heads = {"q_proj": model.num_heads, "k_proj": num_kv_heads}.get(name.rpartition(".")[2])
        keys.append((f"base_model.model.{hf_module}.lora_A.weight", None, module.lora_a.weight))
        keys.append((f"base_model.model.{hf_module}.lora_B.weight", num_heads, module.lora_b.weight))
        if module.use_dora:
            keys.append((f"base_model.model.{hf_module}.lora_magnitude_vector", num_heads, module.magnitude))
    return keys


def _peft_tensors(model: TransformerDecoder) -> dict[str, Tensor]:
    return {
        key: (tensor if num_heads is None else halve_rope_rows(tensor, num_heads)).detach().cpu().contiguous()
        for key, num_heads, tensor in _peft_keys(model)
    }
