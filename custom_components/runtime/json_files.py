"""Reading the JSON files of a checkpoint."""

import json
import re
from pathlib import Path
from typing import Any

from custom_components.runtime.errors import UserError
from custom_components.runtime.text_files import read_text

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        values = read_json_values(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); download the file again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {type(values).__name__}, not a mapping; download the file again")
    return values


def read_json_values(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or has texts that are none.
    """
    text = read_text(path)
    try:
        values = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(values, ensure_ascii=False).encode()  # fails where one half of a character is without the other
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return values
