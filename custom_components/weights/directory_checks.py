"""What is wrong with a directory that was named as a model or as an adapter, and what to name instead.

These checks come first in every recipe, before the tokenizer is read. They open a file only where there is a problem.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from custom_components.runtime.errors import UserError
from custom_components.runtime.json_files import read_json_values
from custom_components.runtime.plain_yaml import MOST_YAML_BYTES, read_yaml
from custom_components.runtime.text_files import read_text
from custom_components.runtime.validation import nearest_name
from custom_components.weights.card_metadata import stated_base_model

_MODEL_CONFIGS = ("config.json", "params.json")
_ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt", "tokenizer.model")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_LFS_POINTER_BYTES = 1024
_HUB_NAME = re.compile(r"(?:https?:/+huggingface\.co/)?([A-Za-z0-9][\w.-]*/[\w.-]+?)(?:/tree/[^/]+)?")
# First parts of relative paths that are folders of one's own, as in the README and configs.
_FOLDERS = {"checkpoints", "models", "model", "outputs", "output", "adapters", "weights", "data", "runs", "ckpt", "tmp"}
_MOST_NAMED = 3


def check_model_directory(directory: Path) -> None:
    """Refuse what is not the directory of a model, in Hugging Face's or Meta's layout.

    Raises:
        UserError: it is not there, or it is a file, an adapter, the output of a training run, a folder of the hub's
            cache, a GGUF model, a folder of models, or a Git LFS clone without its files.
    """
    _check_is_directory("checkpoint_dir", directory, "checkpoints", _MODEL_CONFIGS)
    if not _holds(directory, _MODEL_CONFIGS):
        raise UserError(f"checkpoint_dir: {str(directory)!r} {_no_model(directory)}")
    _check_no_pointers("checkpoint_dir", directory)


def check_adapter_directory(directory: Path, key: str) -> None:
    """Refuse what cannot be the directory of an adapter.

    Args:
        key: the setting that names it.

    Raises:
        UserError: it is not there, or it is a file, a model, a folder of the hub's cache or a GGUF adapter.
    """
    _check_is_directory(key, directory, "adapters", (_ADAPTER_CONFIG,))
    if _holds(directory, (_ADAPTER_CONFIG,)):
        _check_no_pointers(key, directory)
    elif (problem := _cache_or_gguf(directory, (_ADAPTER_CONFIG,), "the adapter")) is not None:
        raise UserError(f"{key}: {str(directory)!r} {problem}")
    elif _holds(directory, _MODEL_CONFIGS) and not any(directory.glob("adapter*")):
        raise UserError(
            f"{key}: {str(directory)!r} is a model, not an adapter; to use it without one set "
            f"checkpoint_dir={directory} {key}=null"
        )


def check_not_quantized(directory: Path, config: dict[str, Any]) -> None:
    """Refuse a model whose weights are stored quantized.

    Args:
        config: its config.json.

    Raises:
        UserError: it names the model it was made from, as far as that is known.
    """
    if (method := _quantization(directory, config)) is None:
        return
    plain = re.sub(r"(?i)[-_](?:unsloth|bnb|gptq|awq|fp8|int[48]|[48]-?bits?|w\d+a\d+|dynamic)\b.*", "", directory.name)
    base = stated_base_model(directory) or (plain if plain != directory.name else None)
    raise UserError(
        f"checkpoint_dir: {str(directory)!r} is already quantized ({method}); name the model that it was made from"
        + (f", {base!r}" if base else "")
        + "; quantize_base=true quantizes it here"
    )


def _quantization(directory: Path, config: dict[str, Any]) -> str | None:
    # AutoGPTQ and AutoAWQ had files of their own before transformers took them up.
    files = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
    stated = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(stated, dict) or not stated:
        return next((method for name, method in files.items() if (directory / name).is_file()), None)
    method = str(stated.get("quant_method") or "bitsandbytes")
    if method == "bitsandbytes" and not (stated.get("load_in_4bit", True) or stated.get("load_in_8bit")):
        return None
    return method.upper() if method in ("gptq", "awq", "fp8", "hqq", "aqlm", "eetq") else method


def _check_is_directory(key: str, path: Path, folder: str, configs: Iterable[str]) -> None:
    if path.is_dir():
        return
    if path.is_file():
        kind = "a GGUF file" if path.suffix == ".gguf" else "a file"
        where = f"; name its directory, {str(path.parent)!r}" if _holds(path.parent, configs) else ""
        hint = f", which only llama.cpp and Ollama read; name {_origin(key)}" if path.suffix == ".gguf" else where
        raise UserError(f"{key}: {str(path)!r} is {kind}, not a directory{hint}")
    hub_name, near = _HUB_NAME.fullmatch(str(path)), _nearest_directory(path)
    if hub_name and near is None and _is_of_hub(hub_name[1]) and not Path(path.parts[0]).is_dir():
        target = f"{folder}/{Path(hub_name[1]).name}"
        todo = f"download it with `{_download(key, hub_name[1], target)}`, then set {key}={target}"
    else:
        run = "" if key == "checkpoint_dir" else "name the adapter/ of a run, or "
        todo = f"{run}download {_origin(key)} with `{_download(key, 'REPOSITORY', str(path))}`"
    if near is not None:
        todo = f"did you mean {str(near)!r}? If not, {todo}"
    raise UserError(f"{key}: {str(path)!r} is not a directory; {todo}")


def _is_of_hub(name: str) -> bool:
    """Tell a repository's name from a relative path of two parts."""
    owner, _, repository = name.partition("/")
    return owner not in _FOLDERS and repository != "adapter"


def _download(key: str, repository: str, target: str) -> str:
    # Without a pattern `tune download` leaves out *.safetensors; an adapter may have no other file than its *.bin.
    pattern = "*.bin" if key == "checkpoint_dir" else "*.gguf"
    return f"tune download {repository} --output-dir {target} --ignore-patterns '{pattern}'"


def _origin(key: str) -> str:
    return "a model" if key == "checkpoint_dir" else "an adapter"


def _no_model(directory: Path) -> str:
    """Say what a directory without a model's config is."""
    if _holds(directory, (_ADAPTER_CONFIG,)):
        return f"is an adapter, not a model; set adapter_dir={directory}{_and_base(_base_of_adapter(directory))}"
    # Ours, then those of a Trainer's run and of torchtune's.
    places = ("adapter", "checkpoints/step_*/adapter", "checkpoint-*", "epoch_*")
    run_adapters = [path for place in places for path in sorted(directory.glob(place), reverse=True)]
    if found := next((path for path in run_adapters if _holds(path, (_ADAPTER_CONFIG,))), None):
        base = _stated(directory / "config.yaml", "checkpoint_dir") or _base_of_adapter(found)
        return f"is the output of a training run, not a model; set adapter_dir={found}{_and_base(base)}"
    if (problem := _cache_or_gguf(directory, _MODEL_CONFIGS, "the model")) is not None:
        return problem
    if inside := sorted(path for path in directory.glob("*/") if _holds(path, _MODEL_CONFIGS)):
        return f"holds no model itself; name {_named(inside)} in it"
    return "has neither config.json nor params.json; is the download whole?"


def _cache_or_gguf(directory: Path, configs: Iterable[str], what: str) -> str | None:
    snapshots = [path for path in directory.glob("snapshots/*/") if _holds(path, configs)]
    if directory.name == "snapshots":
        snapshots = [path for path in directory.glob("*/") if _holds(path, configs)]
    if snapshots:
        newest = max(snapshots, key=lambda path: path.stat().st_mtime)
        return f"is a folder of the hub's cache; name its newest snapshot, {str(newest)!r}"
    if files := sorted(directory.glob("*.gguf")):
        made_from = f"{what} that it was made from, in Hugging Face's format"
        return f"holds only {files[0].name}, which only llama.cpp and Ollama read; name {made_from}"
    return None


def _and_base(base: str | None) -> str:
    return f", and checkpoint_dir to the model that it was trained on{f', {base!r}' if base else ''}"


def _base_of_adapter(adapter_dir: Path) -> str | None:
    return _stated(adapter_dir / _ADAPTER_CONFIG, "base_model_name_or_path")


def _stated(path: Path, key: str) -> str | None:
    """Read a text from a JSON or YAML file; None if there is none."""
    try:
        values = read_json_values(path) if path.suffix == ".json" else read_yaml(read_text(path, MOST_YAML_BYTES))
        value = values[key]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return value if isinstance(value, str) else None


def _check_no_pointers(key: str, directory: Path) -> None:
    """Refuse a clone whose large files are still Git LFS's pointers: texts of three lines."""
    # note: a link of the hub's cache may lead nowhere.
    files = [path for pattern in _WEIGHTS for path in directory.glob(pattern) if path.is_file()]
    pointers = [path for path in files if path.stat().st_size < _MAX_LFS_POINTER_BYTES and _is_pointer(path)]
    if pointers:
        raise UserError(
            f"{key}: {_named(sorted(pointers))} {'are' if len(pointers) > 1 else 'is'} a Git LFS pointer, not the file "
            f"itself; run `git lfs pull` in {str(directory)!r}"
        )


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def _holds(directory: Path, names: Iterable[str]) -> bool:
    return any((directory / name).is_file() for name in names)


def _named(paths: list[Path]) -> str:
    more = f" and {len(paths) - _MOST_NAMED} more" if len(paths) > _MOST_NAMED else ""
    return ", ".join(repr(str(path)) for path in paths[:_MOST_NAMED]) + more


def _nearest_directory(path: Path) -> Path | None:
    """Find the directory whose name is most like the first part of a path that is not there, and the rest below it.

    Names with other numbers are not alike: 7b is not a typo of 13b.
    """
    for parent in reversed([path, *path.parents]):
        if parent.is_dir():
            continue
        others = parent.parent.glob("*/") if parent.parent.is_dir() else ()
        numbers = re.findall(r"\d+", parent.name)
        near = nearest_name(parent.name, [other.name for other in others if re.findall(r"\d+", other.name) == numbers])
        found = parent.parent / near / path.relative_to(parent) if near else None
        return found if found is not None and found.is_dir() else None
    return None
