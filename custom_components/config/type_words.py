"""Describing the types of keys in words, from annotations: `integer > 0 or null`."""

import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from custom_components.config.settings import ComponentNode, Words

_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    type(None): "null",
    dict: "mapping",
    Mapping: "mapping",
    list: "list",
    tuple: "list",
    Sequence: "list",
}
# Above this a bound is there to catch slips, and for the generators of random numbers, not for people.
_LARGEST_BOUND_SAID = 10**5


def type_words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Describe an annotation in words; empty where there are none for it.

    Args:
        annotation: such as `int | None` or `Annotated[float, Field(gt=0)]`.
        metadata: of an outer Annotated.
    """
    metadata = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    for item in metadata:
        if isinstance(item, Words):
            return item.words
    if any(isinstance(item, ComponentNode) for item in metadata):
        alternatives = " or null" if type(None) in get_args(annotation) else ""
        return f"_component_ and its arguments{alternatives}"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_words(arguments[0], [*arguments[1:], *metadata])
    if origin in (Union, types.UnionType):
        return _one_of([words for argument in arguments for words in _alternatives(argument) if words])
    if origin is Literal:
        return _one_of(_alternatives(annotation))
    if origin in (list, Sequence) and (words := type_words(arguments[0])):
        return f"list of {words}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields.items()
        return f"{{{', '.join(f'{name}: {type_words(field.annotation)}' for name, field in fields)}}}"
    return " ".join([_NAMES.get(origin or annotation, ""), _bounds(metadata)]).strip()


def _alternatives(annotation: Any) -> list[str]:
    return (
        [str(value) for value in get_args(annotation)]
        if get_origin(annotation) is Literal
        else [type_words(annotation)]
    )


def _one_of(alternatives: list[str]) -> str:
    """Join words to `a, b or c`."""
    return " or ".join([", ".join(alternatives[:-1])] * (len(alternatives) > 1) + alternatives[-1:])


def _bounds(metadata: Sequence[Any]) -> str:
    """`> 0, < 1`, of pydantic's Gt, Ge, Lt and Le."""
    bounds = [
        f"{sign} {bound:g}"
        for item in metadata
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if (bound := getattr(item, name, None)) is not None and abs(bound) <= _LARGEST_BOUND_SAID
    ]
    return ", ".join(bounds)
