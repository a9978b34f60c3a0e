"""Applying `key=value` overrides to a config as written."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from custom_components.config.checks import union_members
from custom_components.config.component_checks import known_annotations
from custom_components.config.key_hints import nearest_key
from custom_components.config.path_checks import is_path_name
from custom_components.config.secrets import is_secret_name, without_passwords
from custom_components.config.settings import Settings
from custom_components.runtime.errors import UserError
from custom_components.runtime.plain_yaml import read_yaml
from custom_components.runtime.validation import shown


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


def said_override(override: str) -> str:
    """Write an override for a message: cut, and without the value of what is a secret by its name."""
    key, equals, _ = override.partition("=")
    return shown(f"{key}=..." if equals and is_secret_name(key) else without_passwords(override))


def apply_override(raw: RawConfig, override: str, settings_type: type[Settings]) -> None:
    """Set the key of `key=value`, or delete that of `~key`, in place.

    Raises:
        UserError: not an override, a path through a value that is not a node, or a value that is not valid YAML.
    """
    deletes = override.startswith("~")
    key, equals, text = override.removeprefix("~").partition("=")
    said = said_override(override)
    if not key or key.startswith("-") or deletes == bool(equals):
        raise UserError(f"{said} is not an override: write key=value to set a key, ~key to delete it")
    try:
        override.encode()
    except UnicodeEncodeError:
        raise UserError(f"{said}: its bytes are not UTF-8 text; write it as UTF-8") from None
    parent = raw.values
    *parent_names, name = key.split(".")
    for parent_name in parent_names:
        if parent.get(parent_name) is None:
            parent[parent_name] = {}
        parent = parent[parent_name]
        if not isinstance(parent, dict):
            raise UserError(f"{said}: {parent_name!r} is {shown(parent)}, which has no keys of its own")
    if deletes and name not in parent:
        raise UserError(f"{said}: there is no key {key[:80]!r} to delete{nearest_key(key, list(raw.origins))}")
    for stale_key in [known for known in raw.origins if f"{known}.".startswith((f"{key}.", f"{key}["))]:
        del raw.origins[stale_key]
    raw.origins[key] = f"override {said}"
    if deletes:
        del parent[name]
        return
    annotation = known_annotations(settings_type, raw.values).get(key)
    if not text.strip() and (Path in union_members(annotation) or is_path_name(name)):
        # Not null, or `adapter_dir=$ADAPTER` would run without an adapter where the variable is not set.
        parent[name] = Verbatim(text)
    else:
        parent[name] = _parsed(text, annotation, said)


def _parsed(text: str, annotation: Any, said: str) -> Any:
    """Read the value of an override: verbatim for a text key, else YAML.

    A key that takes text beside something else (`str | None`, `str | list`) takes that something where the text is
    it in YAML, so that `null` and lists can be given.
    """
    members = union_members(annotation)
    takes_text = bool(members & {str, Path})
    try:
        value = read_yaml(text)
    except ValueError as error:
        if takes_text:
            return Verbatim(text)
        raise UserError(
            f"override {said}: the value is not valid YAML ({error}); put text with brackets in quotes"
        ) from None
    if not takes_text or (type(value) in members - {str, Path} and type(value) is not NoneType):
        return value
    if value is None and NoneType in members:
        return None
    return Verbatim(text)
