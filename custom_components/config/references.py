"""Resolving the `${key}` references of a config, and those to the environment, which only paths may have."""

import os
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import Node, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from custom_components.config.overrides import RawConfig, Verbatim
from custom_components.config.secrets import is_secret_variable
from custom_components.runtime.validation import shown

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_NESTED = re.compile(r"\$\{[^{}]*\$\{")
# Of a config with all references resolved.
_MOST_CHARACTERS = 10**6
_MOST_REFERENCES = 300
_MISSING = object()


def interpolate(
    raw: RawConfig, is_path: Callable[[str], bool], takes_text: Callable[[str], bool]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Resolve `${key}` references; return the values, and a message for each key that could not be resolved.

    Those keys are left out of the values. :class:`Verbatim` texts do not change, and neither do texts with an
    unfinished reference, such as `Costs ${5`.

    Args:
        is_path: whether a dotted key takes a path: only such a one may refer to the environment.
        takes_text: whether a dotted key takes any text.
    """
    unresolved = _endless_references(raw.values)
    values = {key: _escaped(value) for key, value in raw.values.items() if key not in unresolved}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # omegaconf 2.4 calls it register_resolver, which in 2.3 is another function
        OmegaConf.register_new_resolver("oc.env", _environment(is_path), replace=True)
    while True:
        try:
            return _resolved(values), unresolved
        except OmegaConfBaseException as error:
            place = error.full_key or ""
            key = place.partition("[")[0]  # an element of a list counts as the list
            assert key, error
            *parents, name = key.split(".")
            parent = values
            for parent_name in parents:
                parent = parent[parent_name]
            if isinstance(error, GrammarParseError) and takes_text(key) and "}" not in str(parent[name]):
                parent[name] = _escaped(parent[name], every=True)
                continue
            unresolved[key] = _reason(error, parent.pop(name))


def _resolved(values: dict[str, Any]) -> dict[str, Any]:
    resolved = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _reason(error: OmegaConfBaseException, value: Any) -> str:
    if isinstance(error, GrammarParseError):
        return f"{shown(value)} is not a whole reference; for a text that has it write \\${{"
    return re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error).splitlines()[0])


def _environment(is_path: Callable[[str], bool]) -> Callable[..., Any]:
    """Make OmegaConf's resolver of `${oc.env:NAME}` and `${oc.env:NAME,default}`."""

    def of_environment(name: str, default: Any = _MISSING, *, _node_: Node) -> Any:
        if is_secret_variable(name):
            raise PermissionError(
                f"${{oc.env:{name}}} is a secret by its name; the programs that need it read it there"
            )
        if not is_path(_node_._get_full_key(None).partition("[")[0]):
            raise PermissionError(
                f"only paths may refer to the environment; give it on the command line as key=${name}"
            )
        value = os.environ.get(name, default)
        if value is _MISSING:
            raise LookupError(f"Environment variable '{name}' not found")
        return value

    return of_environment


def _escaped(value: Any, *, every: bool = False) -> Any:
    """Write :class:`Verbatim` texts so that OmegaConf finds no reference in them."""
    if isinstance(value, dict):
        return {key: _escaped(item, every=every) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item, every=every) for item in value]
    if isinstance(value, Verbatim) or (every and isinstance(value, str)):
        # Backslashes before a reference are escapes as well.
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", str(value))
    return value


def _endless_references(values: Mapping[str, Any]) -> dict[str, str]:
    """Find the top-level keys that are too large with their references resolved, each with a message."""
    leaves = {place: text for key, value in values.items() for place, text in _texts(value, key)}
    referring = [place for place, text in leaves.items() if "${" in text]
    if len(referring) > _MOST_REFERENCES:
        return {_top(place): f"is one of more than {_MOST_REFERENCES} texts with references" for place in referring}
    problems = {_top(place): "has a reference in a reference" for place in referring if _NESTED.search(leaves[place])}
    sizes: dict[str, int] = {}

    def size_of(name: str) -> int:
        """Of all that is at a key; for a relative one, of all that it may be."""
        if name not in sizes:
            sizes[name] = 0  # of a circle, which OmegaConf refuses
            key = re.sub(r"\[(\w+)\]", r".\1", name)
            is_meant = f".{key.lstrip('.')}." if key.startswith(".") else f"\n.{key}."
            sizes[name] = sum(size_of_text(text) for place, text in leaves.items() if is_meant in f"\n.{place}.")
        return sizes[name]

    def size_of_text(text: str) -> int:
        return len(text) + sum(size_of(name) for name in _REFERENCE.findall(text) if ":" not in name)

    for place in referring:
        try:
            is_too_large = size_of_text(leaves[place]) > _MOST_CHARACTERS
        except RecursionError:
            is_too_large = True
        if is_too_large:
            problems[_top(place)] = f"{shown(leaves[place])} refers to more than a config can hold"
    return problems


def _top(place: str) -> str:
    return place.partition(".")[0]


def _texts(value: Any, place: str) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in _texts(item, f"{place}.{key}")]
    if isinstance(value, list):
        return [found for index, item in enumerate(value) for found in _texts(item, f"{place}.{index}")]
    text = str(value)
    return [(place, text.replace("${", "") if isinstance(value, Verbatim) else text)]
