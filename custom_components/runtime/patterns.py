"""Regular expressions of others: a few characters can keep Python's own module busy for ever."""

import regex

from custom_components.runtime.errors import UserError
from custom_components.runtime.validation import shown

_LIMIT_SECONDS = 0.5
_MOST_CHARACTERS = 10_000


def checked_pattern(pattern: str) -> str:
    """Check that a text is a regular expression.

    Raises:
        ValueError: it is not.
    """
    if len(pattern) > _MOST_CHARACTERS:
        raise ValueError(f"a regular expression (of {len(pattern)} characters, more than any list of modules needs)")
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"a regular expression ({error})") from None
    return pattern


def matches_whole(pattern: str, text: str) -> bool:
    """Tell whether a regular expression matches all of a text.

    Raises:
        UserError: that takes too long to find out.
        ValueError: it is not one.
    """
    try:
        return regex.fullmatch(checked_pattern(pattern), text, timeout=_LIMIT_SECONDS) is not None
    except TimeoutError:
        raise UserError(
            f"the pattern {shown(pattern)} takes more than {_LIMIT_SECONDS:g} s to match {text!r}; list the modules by "
            "name instead"
        ) from None
