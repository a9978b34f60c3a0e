"""Checks of a node's component and its keys against the recipe's use of them, before anything is built."""

import functools
import inspect
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from custom_components.config.components import component, is_trusted
from custom_components.config.foreign_names import FOREIGN_COMPONENT_KEYS, FOREIGN_COMPONENTS, FOREIGN_PACKAGES
from custom_components.config.key_hints import key_hint
from custom_components.config.settings import ComponentNode, Settings
from custom_components.runtime.validation import model_keys, shown, value_problems

# For arguments the recipe supplies itself: the setting that controls them.
_SUPPLIED_HINTS = {"num_warmup_steps": " and set warmup_steps"}


@dataclass(frozen=True)
class NodeProblem:
    """A problem of a node's component, or of one of its keys: of the key itself, or of its value."""

    key: str
    message: str
    is_of_value: bool = False


def component_nodes(settings_type: type[Settings]) -> dict[str, ComponentNode]:
    """Find the fields of a settings type that have a `_component_`."""
    return {
        name: marker
        for name, field in settings_type.model_fields.items()
        for marker in field.metadata
        if isinstance(marker, ComponentNode)
    }


def known_annotations(settings_type: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the annotations of all keys that may be set, with those of the chosen components, by dotted key."""
    annotations = {name: field.annotation for name, field in settings_type.model_fields.items()}
    for name, node in component_nodes(settings_type).items():
        parameters, hints = _parameters(values.get(name), node)
        for parameter in parameters:
            if parameter not in node.supplied:
                annotations[f"{name}.{parameter}"] = hints.get(parameter)
    return annotations


def component_problems(
    name: str, node: Mapping[str, Any], marker: ComponentNode, known_keys: Sequence[str]
) -> Iterator[NodeProblem]:
    """Find the problems of a node: first of its component, then of its keys.

    Args:
        name: the node's.
        known_keys: all keys that may be set, for hints.
    """
    key = f"{name}._component_"
    path = node.get("_component_")
    if not isinstance(path, str):
        yield NodeProblem(key, f"missing: the dotted path of the component to build, such as {marker.ours}")
        return
    if path in marker.of_other_recipes:
        ours = marker.counterparts.get(path, marker.ours)
        yield NodeProblem(key, f"{path!r} is for {marker.of_other_recipes[path]}; here it is {ours}")
        return
    if not _is_foreign(path, marker) and (problem := _trust_problem(path, marker)) is not None:
        yield NodeProblem(key, f"{shown(path)} {problem}")
        return
    key_problems = [*_key_problems(name, node, marker, known_keys)]
    if not _is_foreign(path, marker):
        try:
            target = component(path)
        except Exception as error:  # noqa: BLE001 - importing a user's module can fail in any way
            yield NodeProblem(key, f"{path!r} cannot be imported ({type(error).__name__}: {error})")
            return
        if (misfit := _misfit(target, marker)) is not None:
            yield NodeProblem(key, f"{path!r} {misfit}; name one such as {marker.ours}")
            return
        if marker.trial is not None and not key_problems:
            keys = {name: value for name, value in node.items() if name != "_component_"}
            try:
                marker.trial(target, keys)
            except Exception as error:  # noqa: BLE001 - a component may refuse its arguments in any way
                yield NodeProblem(name, f"{path} refuses its keys: {' '.join(str(error).split())}")
    else:
        beside = FOREIGN_COMPONENT_KEYS.get(path)
        ours = f"{_our_path(path, marker)}{f' with {beside}' if beside else ''}"
        yield NodeProblem(key, f"{path!r} is not made for this recipe; here it is {ours}")
    yield from key_problems


def _trust_problem(path: str, marker: ComponentNode) -> str | None:
    """Say why a path is not imported for this node; None: it is."""
    package = path.partition(".")[0]
    # Of this project only what is made for such nodes: other functions of it write and delete files.
    own = f"{marker.ours.rpartition('.')[0]}."
    if package == __name__.partition(".")[0] and not path.startswith((own, *marker.libraries)):
        return f"is not made for this node; here it is one such as {marker.ours}"
    if is_trusted(path):
        return None
    recipe = sys.argv[0] if sys.argv[0].endswith(".py") else "RECIPE.py"
    return (
        f"is code from outside of this project, which this config would run; if you trust {shown(package)}, type "
        f"tune run {recipe} --config ... --trust-components {shlex.quote(package[:80])}"
    )


def _key_problems(
    name: str, node: Mapping[str, Any], marker: ComponentNode, known_keys: Sequence[str]
) -> Iterator[NodeProblem]:
    ours = _our_path(node["_component_"], marker)
    parameters, hints = _parameters(node, marker)
    takes_any_key = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name_in_node, value in node.items():
        key = f"{name}.{name_in_node}"
        if name_in_node == "_component_":
            continue
        if name_in_node in marker.supplied:
            hint = _SUPPLIED_HINTS.get(name_in_node, "")
            yield NodeProblem(key, f"{value!r}: the recipe gives this argument itself; delete the key{hint}")
        elif name_in_node not in parameters and not takes_any_key:
            yield NodeProblem(key, f"unknown key of {ours}{key_hint(key, known_keys)}")
        elif name_in_node in hints:
            for place, message in _type_problems(key, value, hints[name_in_node]).items():
                yield NodeProblem(f"{key}{place}", message, is_of_value=True)
    for parameter in parameters.values():
        is_required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if is_required and parameter.name not in node and parameter.name not in marker.supplied:
            yield NodeProblem(f"{name}.{parameter.name}", f"missing: {ours} needs it")


def _is_foreign(path: str, marker: ComponentNode) -> bool:
    return path.partition(".")[0] in FOREIGN_PACKAGES and not path.startswith(marker.libraries)


def _our_path(path: str, marker: ComponentNode) -> str:
    """Give the path itself, or for a foreign component the path of ours that does the same."""
    return FOREIGN_COMPONENTS.get(path, marker.ours) if _is_foreign(path, marker) else path


def _parameters(node: Any, marker: ComponentNode) -> tuple[Mapping[str, inspect.Parameter], dict[str, Any]]:
    """Read parameters and type hints of a node's component, or of ours for a foreign one; empty if there is none."""
    try:
        target = component(_our_path(node["_component_"], marker))
        parameters = inspect.signature(target).parameters
    except Exception:  # noqa: BLE001 - importing a user's module can fail in any way; component_problems reports it
        return {}, {}
    ours = {name: parameter for name, parameter in parameters.items() if name not in marker.of_others}
    return ours, _type_hints(target)


def _type_hints(target: Callable[..., Any]) -> dict[str, Any]:
    function = target.func if isinstance(target, functools.partial) else target
    try:
        return get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)
    except (NameError, TypeError):
        return {}


def _misfit(target: Any, marker: ComponentNode) -> str | None:
    """Say why the recipe cannot use `target` or what it makes, as far as its signature tells; None: it can."""
    if not callable(target):
        return f"is a {type(target).__name__}, not a function or class"
    function = target.func if isinstance(target, functools.partial) else target
    module, own = str(getattr(function, "__module__", "")), marker.ours.rpartition(".")[0]
    if module.startswith(f"{__name__.partition('.')[0]}.") and not f"{module}.".startswith(f"{own}."):
        return f"is from {module}, which makes other things"
    if not inspect.isclass(target) and _type_hints(target).get("return") is type(None):
        return "makes nothing"
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(target).parameters
    except (TypeError, ValueError):  # some built-in types have none
        parameters = {}
    takes_any_key = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for argument in marker.supplied:
        if argument not in parameters and not takes_any_key:
            return f"does not take {argument!r}, which the recipe gives it"
    expected = _made_types(component(marker.ours))
    for made in _made_types(target):
        # A hint that is looser than ours, such as nn.Module, tells nothing.
        if any(issubclass(ours, made) for ours in expected) or _looks_attributes_up(made):
            return None
        for attribute in marker.attributes:
            if not _has_attribute(made, attribute):
                return f"makes a {made.__name__}, which has no {attribute!r}"
        for method, num_arguments in marker.methods.items():
            if not _can_be_called(made, method, num_arguments):
                return f"makes a {made.__name__}, which has no {method!r} of {num_arguments} arguments"
    return None


def _made_types(target: Any) -> list[type]:
    """Find the classes of what a component makes, as far as its annotations tell."""
    if inspect.isclass(target):
        return [target]
    hint = _type_hints(target).get("return")
    return [made for made in (hint, *get_args(hint)) if inspect.isclass(made) and made is not type(None)]


def _looks_attributes_up(made: type) -> bool:
    """Tell whether instances find attributes in their own way, as one that wraps another object does."""
    return any("__getattr__" in vars(base) and not base.__module__.startswith("torch.") for base in made.__mro__)


def _has_attribute(made: type, name: str) -> bool:
    """Tell whether instances have it: from the class, or because a constructor sets it."""
    constructors = [vars(base)["__init__"] for base in made.__mro__ if "__init__" in vars(base)]
    codes = [constructor.__code__ for constructor in constructors if inspect.isfunction(constructor)]
    return hasattr(made, name) or any(name in code.co_names for code in codes)


def _can_be_called(made: type, method: str, num_arguments: int) -> bool:
    if method == "__call__" and hasattr(made, "forward"):
        method = "forward"  # of a torch module, whose __call__ takes anything
    functions = [vars(base)[method] for base in made.__mro__ if method in vars(base)]
    try:
        inspect.signature(functions[0]).bind(None, *range(num_arguments))
    except (IndexError, TypeError, ValueError):
        return False
    return True


def _type_problems(key: str, value: Any, annotation: Any) -> dict[str, str]:
    """Find what is wrong with the value of a key, by place in the value; see :func:`value_problems`."""
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError):
        return {}
    try:
        # As JSON, so that a list is accepted for a tuple, but "False" is not accepted for False.
        adapter.validate_json(json.dumps(value))
    except ValidationError as error:

        def hint(place: str) -> str:
            parent = f"{key}{place}".rpartition(".")[0]
            return key_hint(f"{key}{place}", [f"{parent}.{name}" for name in model_keys(annotation)])

        return value_problems(error, value, hint)
    return {}
