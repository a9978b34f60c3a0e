"""Checks of a config: unknown keys, types, ranges and combinations, with all problems reported at once."""

import json
import re
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError

from custom_components.config.component_checks import component_nodes, component_problems, known_annotations
from custom_components.config.key_hints import key_hint
from custom_components.config.path_checks import output_problems, path_text_problems
from custom_components.config.secrets import secret_problems
from custom_components.config.settings import Settings
from custom_components.runtime.errors import UserError
from custom_components.runtime.validation import value_problems

SettingsType = TypeVar("SettingsType", bound=Settings)


def checked_settings(
    settings_type: type[SettingsType],
    values: dict[str, Any],
    unresolved: dict[str, str],
    raw_values: dict[str, Any],
    origin: Callable[[str], str],
) -> SettingsType:
    """Check resolved values and make the settings object of them.

    Args:
        settings_type: what the recipe reads.
        values: the config with its `${key}` references resolved.
        unresolved: messages of references that cannot be resolved, by key; `values` lacks these keys.
        raw_values: the config before that, to report a problem under the key that a reference names.
        origin: says where a dotted key was set.

    Raises:
        UserError: one message per problem, each with the key, its value, where it was set and the nearest right key.
    """
    if secrets := dict(secret_problems(values)):
        raise UserError(*(f"{key}: {message} ({origin(key)})" for key, message in secrets.items()))
    known_keys = list(known_annotations(settings_type, values))
    nodes = component_nodes(settings_type)
    # A reference to a missing required key is reported once, under that key.
    problems = {
        key: message
        for key, message in unresolved.items()
        if (name := _referenced_key(raw_values, key)) in (None, key)
        or not (name in unresolved or (name in settings_type.model_fields and name not in raw_values))
    }
    settings = None
    try:
        settings = settings_type.model_validate_json(json.dumps(values))
    except ValidationError as error:
        for place, message in value_problems(error, values, lambda place: key_hint(place[1:], known_keys)).items():
            key = re.sub(r"\[\d+\]$", "", place[1:])  # a list of plain values is named as a whole
            is_node = key in nodes and isinstance(values.get(key), str)
            hint = f"; a node has a _component_, such as {nodes[key].ours}, and its arguments" if is_node else ""
            problems.setdefault(key, f"{message}{hint}")
    for name, node in nodes.items():
        if isinstance(values.get(name), dict):
            for problem in component_problems(name, values[name], node, known_keys):
                if problem.key not in unresolved:
                    # A wrong value that comes from a top-level key is reported under that key.
                    passed_on = _referenced_key(raw_values, problem.key) if problem.is_of_value else None
                    problems.setdefault(passed_on or problem.key, problem.message)
            for key, message in path_text_problems(name, values[name]):
                if key not in unresolved:
                    problems.setdefault(_referenced_key(raw_values, key) or key, message)
    if settings is not None and not problems:
        problems = dict(output_problems(settings)) | dict(settings.combination_problems())
    if problems:
        raise UserError(*(f"{key}: {message} ({origin(key)})" for key, message in problems.items()))
    assert settings is not None
    return settings


def union_members(annotation: Any) -> set[Any]:
    """Collect the types that an annotation allows: `{str, NoneType}` for `str | None`, those of a Literal's values."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return union_members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return set().union(*(union_members(member) for member in get_args(annotation)))
    if origin is Literal:
        return {type(value) for value in get_args(annotation)}
    return {origin or annotation}


def _referenced_key(values: Any, key: str) -> str | None:
    """Give `lora_rank` if the raw value of `key` is just `${lora_rank}`, else None."""
    for name in key.split("."):
        if not isinstance(values, dict) or name not in values:
            return None
        values = values[name]
    match = re.fullmatch(r"\$\{([\w.]+)\}", values) if isinstance(values, str) else None
    return match[1] if match else None
