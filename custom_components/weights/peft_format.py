"""PEFT's files of a LoRA adapter: the names of the tensors and the entries of adapter_config.json.

Format: huggingface/peft 0.21.2, src/peft/utils/save_and_load.py (keys), src/peft/tuners/lora/config.py (config) and
`check_target_module_exists` in src/peft/tuners/tuners_utils.py (which layers a config targets).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from custom_components.models.dora import DoRALinear
from custom_components.models.linear_names import TARGETS, hugging_face_module, matching_pattern
from custom_components.models.lora import LoRALinear
from custom_components.runtime.errors import UserError
from custom_components.runtime.json_files import read_json_values
from custom_components.runtime.patterns import matches_whole
from custom_components.runtime.validation import shown, value_problems
from custom_components.weights.names import TUNE_NAMES_OF_HUGGING_FACE, translated_name
from custom_components.weights.peft_keys import PeftKeys, as_list

ADAPTER_CONFIG_NAME = "adapter_config.json"
# Weights of the base that PEFT saves along: with an adapter on the head, a resized vocabulary, or `modules_to_save`.
BASE_WEIGHTS = ("tok_embeddings.weight", "output.weight")

# PEFT's name of every parameter that an adapter may have.
ADAPTER_PARAMETERS = {**LoRALinear.peft_names, **DoRALinear.peft_names}
_TUNE_PARTS = {part.removesuffix(".weight"): tune for tune, part in ADAPTER_PARAMETERS.items()}

# The prefix is absent where transformers saved with save_peft_format=False; torch.compile adds one; the adapter's name
# stays where a model's own state dict was saved.
_PEFT_KEY = re.compile(
    r"(?:base_model\.model\.)?(?:_orig_mod\.)?(?P<module>.+?)"
    rf"\.(?P<part>{'|'.join(_TUNE_PARTS)})(?:\.default)?(?:\.weight)?"
)
# `BASE_WEIGHTS` and norms: wrapped in an adapter, or plain for a resized vocabulary and for `modules_to_save`.
_PEFT_BASE_KEY = re.compile(
    r"(?:base_model\.model\.)?(?:_orig_mod\.)?(?P<module>lm_head|model\.embed_tokens|(?:model\.)?(?:\w+\.)*\w*norm)"
    r"(?:(?:\.token_adapter)?\.base_layer|\.modules_to_save(?:\.default)?)?\.weight"
)
_PEFT_ROWS_KEY = re.compile(
    r"(?:base_model\.model\.)?(?:_orig_mod\.)?(?P<module>lm_head|model\.embed_tokens)"
    r"\.token_adapter\.trainable_tokens_delta(?:\.default)?"
)
# The matrices of which single rows may be trained, by the ends of PEFT's names.
TOKEN_MATRICES = {"embed_tokens": "tok_embeddings", "lm_head": "output"}
TOKEN_ROWS = "token_rows.rows"
# What `modules_to_save` was before it was trained, stored where the vocabulary was resized.
_UNUSED_KEY = re.compile(r".*\.original_module\.weight")

# With one of these entries, the tensors of the file are not the whole adapter.
_UNSUPPORTED = (
    *("target_parameters", "lora_bias", "layer_replication", "use_qalora", "use_bdlora"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config"),
)
# Llama's layers have no biases: nothing of them can be in the file.
_BIASES = (None, "none", "all", "lora_only")
# These change the frozen weights as well, which an adapter's file does not hold.
_UNSUPPORTED_INITIALIZATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftConfig:
    """The entries of an adapter_config.json.

    Attributes:
        target_modules: a regular expression of whole module names, or ends of them; "all-linear": all but the head.
        exclude_modules: of the same form; these are not adapted whatever `target_modules` says.
        layers_to_transform: numbers of the layers that are adapted; None: all.
        layers_pattern: names of lists of layers to which `layers_to_transform` refers; empty: any.
        rank_pattern, alpha_pattern: rank and alpha of other layers, by regular expressions of their names' ends.
        modules_to_save: ends of the names of modules that were trained whole, and are not adapted.
        token_ids: the tokens whose rows were trained, in the file's order, by the matrix, of `TOKEN_MATRICES`' values.
    """

    path: Path
    rank: int
    alpha: float
    target_modules: str | list[str]
    exclude_modules: str | list[str]
    layers_to_transform: list[int] | None
    layers_pattern: list[str]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    modules_to_save: list[str]
    token_ids: Mapping[str, list[int]]
    use_rslora: bool
    use_dora: bool

    def rank_of(self, module: str) -> int:
        """Give the rank of a linear layer with an adapter, by Hugging Face's name of it."""
        return self.rank_pattern.get(matching_pattern(self.rank_pattern, (module,)) or "", self.rank)

    def alpha_of(self, module: str) -> float:
        """Give the alpha of a linear layer with an adapter, by Hugging Face's name of it."""
        return self.alpha_pattern.get(matching_pattern(self.alpha_pattern, (module,)) or "", self.alpha)

    def targets(self, module: str) -> bool:
        """Tell whether a linear layer, by Hugging Face's name (model.layers.0.self_attn.q_proj), has an adapter."""
        if self.exclude_modules and _matches(self.exclude_modules, module):
            return False
        if any(matches_whole(rf"(.*\.)?{saved}(\..*)?", module) for saved in self.modules_to_save):
            return False
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            return module != "lm_head"
        # Layers are chosen by number only among modules that are named by the end of their name.
        if isinstance(self.target_modules, str) or module in self.target_modules or self.layers_to_transform is None:
            return _matches(self.target_modules, module)
        return _matches(self.target_modules, module) and self._layer_of(module) in self.layers_to_transform

    def _layer_of(self, module: str) -> int | None:
        starts = [rf"(.*\.)?{pattern}" for pattern in self.layers_pattern] or [r".*\.[^.]*"]
        numbers = [number for number in module.split(".")[1:-1] if number.isdecimal()]
        found = (n for start in starts for n in numbers if matches_whole(rf"{start}\.{n}\..*", module))
        return next(map(int, found), None)


def read_peft_config(adapter_dir: Path) -> PeftConfig:
    """Read the config of an adapter's directory.

    Raises:
        UserError: there is none, it is not a LoRA adapter's, or it needs what cannot be built here.
    """
    path = adapter_dir / ADAPTER_CONFIG_NAME
    try:
        entries = read_json_values(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a LoRA adapter's config ({error})") from None
    if not isinstance(entries, dict):
        raise UserError(f"{path}: holds {type(entries).__name__}, not a mapping; save the adapter again")
    if (kind := entries.get("peft_type", "LORA")) != "LORA":
        raise UserError(f"{path}: peft_type is {shown(kind)}; only LoRA adapters can be loaded")
    if missing := [key for key in ("r", "lora_alpha") if key not in entries]:
        raise UserError(f"{path}: has no {' and no '.join(missing)}; is this the config of a LoRA adapter?")
    try:
        keys = PeftKeys.model_validate(entries)
    except ValidationError as error:
        problems = value_problems(error, entries, lambda place: "").items()
        raise UserError(*(f"{path}: {place.removeprefix('.')}: {message}" for place, message in problems)) from None
    config = PeftConfig(
        path=path,
        rank=keys.r,
        alpha=keys.lora_alpha,
        target_modules=keys.target_modules,
        exclude_modules=keys.exclude_modules or [],
        layers_to_transform=as_list(keys.layers_to_transform) or None,
        layers_pattern=as_list(keys.layers_pattern),
        rank_pattern=keys.rank_pattern or {},
        alpha_pattern=keys.alpha_pattern or {},
        modules_to_save=as_list(keys.modules_to_save),
        token_ids=_token_ids(keys.trainable_token_indices or {}, path),
        use_rslora=bool(keys.use_rslora),
        use_dora=bool(keys.use_dora),
    )
    unsupported = [f"{key} is {shown(entries[key])}" for key in _UNSUPPORTED if entries.get(key)]
    if (bias := entries.get("bias")) is not None and bias not in _BIASES:
        unsupported.append(f"bias is {shown(bias)}, Llama's layers have none")
    if str(initialization := entries.get("init_lora_weights")).lower().startswith(_UNSUPPORTED_INITIALIZATIONS):
        unsupported.append(f"init_lora_weights is {shown(initialization)}, which changes the base model too")
    if unsupported:
        raise UserError(f"{path}: {'; '.join(unsupported)}: such an adapter cannot be built here")
    return config


def peft_key(parameter: str) -> str:
    """Give PEFT's key of an adapter's parameter, layers.0.attn.q_proj.lora_a.weight for example."""
    if parameter.endswith(TOKEN_ROWS):
        return peft_rows_key(parameter.partition(".")[0])
    part = next(part for part in ADAPTER_PARAMETERS if parameter.endswith(f".{part}"))
    return f"{peft_module(parameter.removesuffix(f'.{part}'))}.{ADAPTER_PARAMETERS[part]}"


def peft_rows_key(matrix: str) -> str:
    """Give PEFT's key of the trained rows of a matrix, tok_embeddings or output."""
    name = "lm_head" if matrix == "output" else "model.embed_tokens"
    return f"base_model.model.{name}.token_adapter.trainable_tokens_delta"


def peft_module(module: str) -> str:
    """Give PEFT's name of a module with an adapter, layers.0.attn.q_proj for example."""
    return f"base_model.model.{hugging_face_module(module)}"


def is_unused(key: str) -> bool:
    """Tell whether PEFT stores a tensor that it does not compute with."""
    return _UNUSED_KEY.fullmatch(key) is not None


def parameter_name(key: str) -> str | None:
    """Find the model's parameter for a key, in any spelling that PEFT writes; None: no Llama has it."""
    if match := _PEFT_ROWS_KEY.fullmatch(key):
        return f"{TOKEN_MATRICES[match['module'].rpartition('.')[2]]}.{TOKEN_ROWS}"
    if match := _PEFT_BASE_KEY.fullmatch(key):
        return translated_name(f"{match['module']}.weight", TUNE_NAMES_OF_HUGGING_FACE)
    match = _PEFT_KEY.fullmatch(key)
    if match is None or match["module"].rpartition(".")[2] not in TARGETS:
        return None
    weight = translated_name(f"{match['module']}.weight", TUNE_NAMES_OF_HUGGING_FACE)
    return f"{weight.removesuffix('.weight')}.{_TUNE_PARTS[match['part']]}" if weight else None


def _matches(targets: str | list[str], module: str) -> bool:
    if isinstance(targets, str):
        return matches_whole(targets, module)
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _token_ids(value: list[int] | dict[str, list[int]], path: Path) -> dict[str, list[int]]:
    """Read trainable_token_indices: ids of the embedding's rows, or such lists by the name of the matrix."""
    by_name = {"embed_tokens": value} if isinstance(value, list) else value
    token_ids = {TOKEN_MATRICES.get(name.rpartition(".")[2]): ids for name, ids in by_name.items()}
    if None in token_ids or any(len({*ids}) < len(ids) for ids in token_ids.values()):
        raise UserError(
            f"{path}: trainable_token_indices is {shown(value)}, not ids of the rows of {[*TOKEN_MATRICES]}"
        )
    return {name: ids for name, ids in token_ids.items() if name is not None and ids}
