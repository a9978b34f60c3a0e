"""Every key of a config against what is read: unknown keys, types, ranges, combinations, all problems at once."""

import difflib
import functools
import inspect
import json
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from custom_components.config.components import component
from custom_components.config.settings import ComponentNode, Settings
from custom_components.runtime.errors import UserError

SettingsType = TypeVar("SettingsType", bound=Settings)


# Where the recipe gets what it supplies to a component from.
_HINTS = {"num_warmup_steps": " and set warmup_steps"}


def checked_settings(
    settings_type: type[SettingsType],
    values: dict[str, Any],
    unresolved: dict[str, str],
    raw_values: dict[str, Any],
    origin: Callable[[str], str],
) -> SettingsType:
    """The settings object of resolved values.

    Args:
        settings_type: what the recipe reads.
        values: the config with its `${key}` references resolved.
        unresolved: messages of the references that lead nowhere, by key; `values` lacks these keys.
        raw_values: the same before that, to blame the key that a reference names.
        origin: where a dotted key was set, in words.

    Raises:
        UserError: one message per problem, each with the key, its value, where it was set and the nearest right key.
    """
    known_keys = list(known_annotations(settings_type, values))
    # A reference to a key that has to be set and is not is that key's problem.
    problems = {
        key: message
        for key, message in unresolved.items()
        if _referenced_key(raw_values, key) not in settings_type.model_fields
    }
    settings = None
    try:
        settings = settings_type.model_validate_json(json.dumps(values))
    except ValidationError as error:
        for key, message in _described(error, known_keys):
            problems.setdefault(key, message)
    for name, node in component_nodes(settings_type).items():
        if isinstance(values.get(name), dict):
            for key, message in _component_problems(name, values[name], node, known_keys):
                # A nested key that only passes a top-level one on is the top-level key's problem.
                if key not in unresolved:
                    problems.setdefault(_referenced_key(raw_values, key) or key, message)
    if settings is not None and not problems:
        problems = dict(settings.combination_problems())
    if problems:
        raise UserError(*(f"{key}: {message} ({origin(key)})" for key, message in problems.items()))
    assert settings is not None
    return settings


def component_nodes(settings_type: type[Settings]) -> dict[str, ComponentNode]:
    """The fields of a settings type that hold a `_component_`."""
    return {
        name: marker
        for name, field in settings_type.model_fields.items()
        for marker in field.metadata
        if isinstance(marker, ComponentNode)
    }


def known_annotations(settings_type: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """The annotation of every key that may be set, those of the chosen components included, by dotted key."""
    annotations = {name: field.annotation for name, field in settings_type.model_fields.items()}
    for name, node in component_nodes(settings_type).items():
        parameters, hints = _parameters(values.get(name))
        for parameter in parameters:
            if parameter not in node.supplied:
                annotations[f"{name}.{parameter}"] = hints.get(parameter)
    return annotations


def union_members(annotation: Any) -> set[Any]:
    """The types that an annotation allows: `{str, NoneType}` for `str | None`; a Literal is its values' types."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return union_members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return set().union(*(union_members(member) for member in get_args(annotation)))
    if origin is Literal:
        return {type(value) for value in get_args(annotation)}
    return {origin or annotation}


def nearest_key(key: str, known_keys: list[str]) -> str:
    """`; did you mean 'lora_rank'?`, or nothing where no known key is near."""
    by_last_name = {known.rpartition(".")[2]: known for known in reversed(known_keys)}
    near = difflib.get_close_matches(key, known_keys, n=1) or [
        by_last_name[name] for name in difflib.get_close_matches(key.rpartition(".")[2], list(by_last_name), n=1)
    ]
    return f"; did you mean {near[0]!r}?" if near else ""


def _described(error: ValidationError, known_keys: list[str]) -> Iterator[tuple[str, str]]:
    problems_by_key: dict[str, list[Any]] = {}
    for problem in error.errors(include_url=False):
        problems_by_key.setdefault(str(problem["loc"][0]), []).append(problem)
    for key, problems in problems_by_key.items():
        if problems[0]["type"] == "extra_forbidden":
            yield key, f"unknown key{nearest_key(key, known_keys)}"
        elif problems[0]["type"] == "missing":
            yield key, "missing: this key has no default"
        else:
            yield key, f"{problems[0]['input']!r} {_expectation(problems)}"


def _expectation(problems: Sequence[Any]) -> str:
    """`should be a valid boolean or 'auto'`, of the messages of one value's alternatives."""
    alternatives = dict.fromkeys(
        problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        for problem in problems
        if problem["type"] != "needs_python_object"  # an alternative that no config can spell, such as a tensor
    )
    return f"should be {' or '.join(alternatives)}"


def _parameters(node: Any) -> tuple[Mapping[str, inspect.Parameter], dict[str, Any]]:
    """Parameters and type hints of a node's component; empty where it cannot be imported."""
    try:
        target = component(node["_component_"])
        parameters = inspect.signature(target).parameters
    except Exception:  # noqa: BLE001 - importing a user's module can fail in any way; _component_problems reports it
        return {}, {}
    function = target.func if isinstance(target, functools.partial) else target
    try:
        hints = get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)
    except (NameError, TypeError):
        hints = {}
    return parameters, hints


def _component_problems(
    name: str, node: dict[str, Any], marker: ComponentNode, known_keys: list[str]
) -> Iterator[tuple[str, str]]:
    if not isinstance(node.get("_component_"), str):
        yield f"{name}._component_", "missing: the dotted path of the component to build"
        return
    try:
        target = component(node["_component_"])
    except Exception as error:  # noqa: BLE001 - importing a user's module can fail in any way
        yield f"{name}._component_", f"{node['_component_']!r} cannot be imported ({type(error).__name__}: {error})"
        return
    if not callable(target):
        yield f"{name}._component_", f"{node['_component_']!r} is a {type(target).__name__}, not a function or class"
        return
    parameters, hints = _parameters(node)
    takes_any_key = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key, value in node.items():
        if key == "_component_":
            continue
        if key in marker.supplied:
            yield (
                f"{name}.{key}",
                f"{value!r}: the recipe gives this argument itself; delete the key{_HINTS.get(key, '')}",
            )
        elif key not in parameters and not takes_any_key:
            siblings = [known for known in known_keys if known.startswith(f"{name}.")]
            near = nearest_key(f"{name}.{key}", siblings) or nearest_key(key, known_keys)
            yield f"{name}.{key}", f"unknown key of {node['_component_']}{near}"
        elif key in hints:
            yield from ((f"{name}.{key}", message) for message in _type_problems(value, hints[key]))
    for parameter in parameters.values():
        is_required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if is_required and parameter.name not in node and parameter.name not in marker.supplied:
            yield f"{name}.{parameter.name}", f"missing: {node['_component_']} needs it"


def _type_problems(value: Any, annotation: Any) -> Iterator[str]:
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError):
        return
    try:
        # As JSON, so that a list may stand for a tuple while "False" may not stand for False.
        adapter.validate_json(json.dumps(value))
    except ValidationError as error:
        yield f"{value!r} {_expectation(error.errors())}"


def _referenced_key(values: Any, key: str) -> str | None:
    """`lora_rank` if the raw value of `key` is just `${lora_rank}`."""
    for name in key.split("."):
        if not isinstance(values, dict) or name not in values:
            return None
        values = values[name]
    match = re.fullmatch(r"\$\{([\w.]+)\}", values) if isinstance(values, str) else None
    return match[1] if match else None
