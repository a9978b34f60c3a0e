"""Messages for the problems that pydantic finds in a value: one for each place in it."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

# Names at least this similar count as typos of each other: `sauce` and `source` are 0.73.
_LIKENESS = 0.7
_MOST_SHOWN = 80  # characters of a value


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Find the known name that `name` may be a typo of, also in capitals or with hyphens; None where none is near."""
    by_spelling = {_plain(other): other for other in reversed([*known])}
    near = difflib.get_close_matches(_plain(name), by_spelling, n=1, cutoff=_LIKENESS)
    return by_spelling[near[0]] if near else None


def value_problems(error: ValidationError, value: Any, hint: Callable[[str], str]) -> dict[str, str]:
    """Give a message for each wrong place in `value`, such as `[1].weight`; "" is the value itself.

    Where a value has the shape of one alternative of a union, the others are not mentioned.

    Args:
        hint: what to add for the place of an unknown key, such as `; did you mean 'weight'?`.
    """
    by_place: dict[str, list[Any]] = {}
    for problem in error.errors(include_url=False):
        by_place.setdefault(_place(problem, value), []).append(problem)
    return {
        place: _message(problems, hint(place))
        for place, problems in by_place.items()
        if not any(other.startswith((f"{place}.", f"{place}[")) for other in by_place)
    }


def shown(value: Any) -> str:
    """Write a value as Python does; of a long one the start."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python writes, or in a list of them
        return f"a {type(value).__name__} too large to write"
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 4]} ..."


def model_keys(annotation: Any) -> Iterator[str]:
    """Yield the keys of every pydantic model in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from annotation.model_fields
    for member in get_args(annotation):
        yield from model_keys(member)


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _place(problem: Any, value: Any) -> str:
    """Spell a location as `[1].weight`, without the alternatives of unions that pydantic names in it."""
    place, parts = "", problem["loc"]
    for index, part in enumerate(parts):
        is_missing = problem["type"] == "missing" and index == len(parts) - 1
        if isinstance(value, list) and isinstance(part, int) and part < len(value):
            place, value = f"{place}[{part}]", value[part]
        elif isinstance(value, dict) and (part in value or is_missing):
            place, value = f"{place}.{part}", value.get(part)
    return place


def _message(problems: Sequence[Any], hint: str) -> str:
    if problems[0]["type"] == "extra_forbidden":
        return f"unknown key{hint}"
    if problems[0]["type"] == "missing":
        is_in_tuple = isinstance(problems[0]["loc"][-1], int)
        return (
            f"{shown(problems[0]['input'])} has too few values" if is_in_tuple else "missing: this key has no default"
        )
    return f"{shown(problems[0]['input'])} {_expectation(problems)}"


def _expectation(problems: Sequence[Any]) -> str:
    """Join the messages of a value's alternatives: `should be a valid boolean or 'auto'`."""
    alternatives = dict.fromkeys(
        problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        for problem in problems
        if problem["type"] != "needs_python_object"  # an alternative that no config can spell, such as a tensor
    )
    return f"should be {' or '.join(alternatives)}"
