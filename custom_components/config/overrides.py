"""Applying `key=value` overrides and `${key}` references to a config as written."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from custom_components.config.checks import union_members
from custom_components.config.component_checks import known_annotations
from custom_components.config.key_hints import nearest_key
from custom_components.config.path_checks import is_path_name
from custom_components.config.settings import Settings
from custom_components.runtime.errors import UserError


@dataclass
class RawConfig:
    """A config as written: plain values, and where each dotted key was set last."""

    path: Path
    values: dict[str, Any]
    origins: dict[str, str] = field(default_factory=dict)

    def origin(self, key: str) -> str:
        """Say where `key`, such as `dataset.source[1].weight`, was set; else a key inside it, or the node it is in."""
        while key:
            for known in (key, *self.origins):
                if known in self.origins and f"{known}.".startswith((f"{key}.", f"{key}[")):
                    return self.origins[known]
            key = re.sub(r"(^|\.)[^.\[]*$|\[\d+\]$", "", key)
        return str(self.path)


class Verbatim(str):
    """Text from the command line for a text key: it is taken as it is, without resolving `${...}`."""


def apply_override(
    raw: RawConfig, override: str, settings_type: type[Settings], yaml_loader: type[yaml.SafeLoader]
) -> None:
    """Set the key of `key=value`, or delete that of `~key`, in place.

    Raises:
        UserError: not an override, a path through a value that is not a node, or a value that is not valid YAML.
    """
    deletes = override.startswith("~")
    key, equals, text = override.removeprefix("~").partition("=")
    if not key or key.startswith("-") or deletes == bool(equals):
        raise UserError(f"{override!r} is not an override: write key=value to set a key, ~key to delete it")
    parent = raw.values
    *parent_names, name = key.split(".")
    for parent_name in parent_names:
        if parent.get(parent_name) is None:
            parent[parent_name] = {}
        parent = parent[parent_name]
        if not isinstance(parent, dict):
            raise UserError(f"{override!r}: {parent_name!r} is {parent!r}, which has no keys of its own")
    if deletes and name not in parent:
        raise UserError(f"{override!r}: there is no key {key!r} to delete{nearest_key(key, list(raw.origins))}")
    for stale_key in [known for known in raw.origins if f"{known}.".startswith((f"{key}.", f"{key}["))]:
        del raw.origins[stale_key]
    raw.origins[key] = f"override {override!r}"
    if deletes:
        del parent[name]
        return
    annotation = known_annotations(settings_type, raw.values).get(key)
    if not text.strip() and (Path in union_members(annotation) or is_path_name(name)):
        # Not null, or `adapter_dir=$ADAPTER` would run without an adapter where the variable is not set.
        parent[name] = Verbatim(text)
    else:
        parent[name] = _parsed(text, annotation, override, yaml_loader)


def _parsed(text: str, annotation: Any, override: str, yaml_loader: type[yaml.SafeLoader]) -> Any:
    """Read the value of an override: verbatim for a text key, else YAML.

    A key that takes text beside something else (`str | None`, `str | list`) takes that something where the text is
    it in YAML, so that `null` and lists can be given.
    """
    members = union_members(annotation)
    takes_text = bool(members & {str, Path})
    try:
        value = yaml.load(text, Loader=yaml_loader)
    except yaml.YAMLError:
        if takes_text:
            return Verbatim(text)
        raise UserError(
            f"override {override!r}: the value is not valid YAML; put text with brackets in quotes"
        ) from None
    if not takes_text or (type(value) in members - {str, Path} and type(value) is not NoneType):
        return value
    if value is None and NoneType in members:
        return None
    return Verbatim(text)


def interpolate(raw: RawConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Resolve `${key}` references; return the values, and a message for each key that could not be resolved.

    Those keys are left out of the values. :class:`Verbatim` texts do not change.
    """
    verbatim_texts: list[str] = []

    def placeholder(index: int) -> str:
        return f"\N{NULL}{index}\N{NULL}"

    def hide(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: hide(item) for key, item in value.items()}
        if isinstance(value, list):
            return [hide(item) for item in value]
        if isinstance(value, Verbatim):
            verbatim_texts.append(str(value))
            return placeholder(len(verbatim_texts) - 1)
        return value

    def show(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: show(item) for key, item in value.items()}
        if isinstance(value, list):
            return [show(item) for item in value]
        if isinstance(value, str):
            for index, text in enumerate(verbatim_texts):
                value = value.replace(placeholder(index), text)
        return value

    config = OmegaConf.create(hide(raw.values))
    unresolved: dict[str, str] = {}
    while True:
        try:
            return show(OmegaConf.to_container(config, resolve=True)), unresolved
        except OmegaConfBaseException as error:
            key = (error.full_key or "").partition("[")[0]  # an element of a list counts as the list
            assert key, error
            unresolved[key] = str(error).splitlines()[0]
            parent_key, _, name = key.rpartition(".")
            del (OmegaConf.select(config, parent_key) if parent_key else config)[name]
