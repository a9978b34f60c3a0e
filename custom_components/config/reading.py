"""Reading a YAML config and its command-line overrides, strictly, before anything is loaded.

How a value is read: YAML file -> overrides (:mod:`overrides`) -> interpolation (OmegaConf) -> checks (:mod:`checks`)
-> a settings object, see :mod:`settings`. Every value keeps its origin (file and line, or the
override as typed), so that a problem can name it.
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast, get_args

import yaml

from custom_components.config.checks import checked_settings, union_members
from custom_components.config.component_checks import known_annotations
from custom_components.config.components import trust_packages
from custom_components.config.knobs import link_knobs, settle_overrides
from custom_components.config.overrides import RawConfig, apply_override
from custom_components.config.path_checks import is_path_name
from custom_components.config.recipe_files import HELP_FLAGS, config_named_in
from custom_components.config.recipe_help import recipe_help
from custom_components.config.references import interpolate
from custom_components.config.renamed import rename_components
from custom_components.config.settings import Settings
from custom_components.runtime.errors import UserError
from custom_components.runtime.plain_yaml import MOST_YAML_BYTES, read_yaml_nodes
from custom_components.runtime.terminal import say
from custom_components.runtime.text_files import read_text

SettingsType = TypeVar("SettingsType", bound=Settings)


def load_settings(settings_type: type[SettingsType], arguments: Sequence[str]) -> SettingsType:
    """Read and check the settings that `--config FILE key=value ...` describes.

    Args:
        settings_type: what the recipe reads, one of :mod:`settings`.
        arguments: the command line without the program's name. `key=value` sets a key, dotted or top-level, and the
            value may contain `=`; `~key` deletes one; a key given twice keeps the last value. `--trust-components NAME`
            lets the config name code of that package.

    Raises:
        UserError: with one message for every problem found.
        SystemExit: after `--help`.
    """
    if any(flag in arguments for flag in HELP_FLAGS):
        _show_help(settings_type, arguments)
    config_path, overrides, trusted = _split_arguments(arguments)
    trust_packages(trusted)
    raw = read_yaml(config_path)
    renamed = rename_components(raw.values)
    link_knobs(raw.values)
    # note: of the same keys, and more; a reader of several kinds of config reads what they have in common.
    settings_type = cast(type[SettingsType], settings_type.for_config(raw.values))
    for override in overrides:
        apply_override(raw, override, settings_type)
        renamed |= rename_components(raw.values)
    settle_overrides(raw, [override.removeprefix("~").partition("=")[0] for override in overrides], settings_type)
    for before, today in renamed.items():
        say(f"{before} is now {today}: read as that")
    for name, field in settings_type.model_fields.items():
        if not field.is_required():
            default = field.get_default()
            raw.values.setdefault(name, str(default) if isinstance(default, Path) else default)
    annotations = known_annotations(settings_type, raw.values)
    values, unresolved = interpolate(
        raw,
        is_path=lambda key: is_path_name(key.rpartition(".")[2]) or _takes(Path, annotations.get(key)),
        takes_text=lambda key: _takes(str, annotations.get(key)),
    )
    settings = checked_settings(settings_type, values, unresolved, raw.values, raw.origin)
    for note in settings.notes():
        say(f"note: {note}")
    return settings


def read_yaml(path: Path) -> RawConfig:
    """Read a YAML file with the line of every key. Of a key written twice the last value counts."""
    try:
        text = read_text(path, MOST_YAML_BYTES)
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file; configs/ holds those that come with the project") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path}: cannot be read as text ({error})") from None
    try:
        root, values = read_yaml_nodes(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, this is {type(values).__name__}")
    raw = RawConfig(path, values)
    _record_lines(root, "", raw)
    return raw


def config_text(settings: Settings) -> str:
    """Spell out the resolved settings, overrides and defaults included, as YAML that `--config` reads back."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _takes(kind: type, annotation: Any) -> bool:
    """Tell whether a key takes values of a type, or lists of them."""
    return any(kind in union_members(part) for part in (annotation, *get_args(annotation)))


def _record_lines(node: yaml.Node | None, key: str, raw: RawConfig) -> None:
    if isinstance(node, yaml.MappingNode):
        items = [(f"{key}.{name.value}".removeprefix("."), name, value) for name, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        items = [(f"{key}[{index}]", value, value) for index, value in enumerate(node.value)]
    else:
        items = []
    for item_key, first, value in items:
        raw.origins[item_key] = f"{raw.path}:{first.start_mark.line + 1}"
        _record_lines(value, item_key, raw)


def _show_help(settings_type: type[Settings], arguments: Sequence[str]) -> NoReturn:
    """Print what the running recipe takes, as `tune run RECIPE --help` does without running it."""
    description = getattr(sys.modules["__main__"], "__doc__", None) or settings_type.__doc__ or ""
    given = [value for flag, value in itertools.pairwise(arguments) if flag == "--config"]
    paths = [Path(name) for name in (*given, config_named_in(description)) if name is not None]
    print(recipe_help(description, settings_type, next((path for path in paths if path.is_file()), None)))
    sys.exit()


def _split_arguments(arguments: Sequence[str]) -> tuple[Path, list[str], list[str]]:
    """Give the config's path, the overrides, and the packages whose code may run."""
    config_path, overrides, trusted = None, [], []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument == "--config" and remaining:
            config_path = remaining.pop(0)
        elif argument.startswith("--config="):
            config_path = argument.removeprefix("--config=")
        elif argument == "--trust-components" and remaining:
            trusted.append(remaining.pop(0))
        elif argument.startswith("--trust-components="):
            trusted.append(argument.removeprefix("--trust-components="))
        else:
            overrides.append(argument)
    if config_path is None:
        raise UserError("--config is missing: name a file, as in --config configs/tiny_qlora.yaml")
    if not config_path.strip():
        raise UserError(f"--config: {config_path!r} is empty: a shell variable may be unset")
    return Path(config_path), overrides, trusted
