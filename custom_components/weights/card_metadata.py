"""The front matter of a model card, README.md beside the weights."""

import re
from pathlib import Path
from typing import Any

from custom_components.runtime.plain_yaml import read_yaml
from custom_components.runtime.text_files import read_text

CARD_NAME = "README.md"
# The format: huggingface/huggingface_hub, src/huggingface_hub/repocard.py, REGEX_YAML_BLOCK.
_FRONT_MATTER = re.compile(r"\s*---\n(.*?)\n---[ \t]*(\n|$)", re.DOTALL)


def card_metadata(path: Path) -> dict[str, Any]:
    """Read a card's front matter; empty where there is none, or no card."""
    try:
        # note: huggingface_hub's reader takes any YAML, and waits for a pipe.
        matter = _FRONT_MATTER.match(read_text(path))
        values = read_yaml(matter[1]) if matter else None
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def stated_base_model(directory: Path) -> str | None:
    """Read what the card in a directory names as the model that this one was made from; None: it names none."""
    stated = card_metadata(directory / CARD_NAME).get("base_model")
    first = stated[0] if isinstance(stated, list) and stated else stated
    return first if isinstance(first, str) else None


def names_no_base_model(directory: Path) -> bool:
    """Tell whether a directory has a card, and one of a model that was not made from another."""
    stated = card_metadata(directory / CARD_NAME)
    return bool(stated) and "base_model" not in stated
