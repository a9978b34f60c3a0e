"""The front matter of a model card, README.md beside the weights."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load

CARD_NAME = "README.md"


def card_metadata(path: Path) -> dict[str, Any]:
    """Read a card's front matter; empty where there is none, or no card."""
    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def stated_base_model(directory: Path) -> str | None:
    """Read what the card in a directory names as the model that this one was made from; None: it names none."""
    stated = card_metadata(directory / CARD_NAME).get("base_model")
    first = stated[0] if isinstance(stated, list) and stated else stated
    return first if isinstance(first, str) else None


def names_no_base_model(directory: Path) -> bool:
    """Tell whether a directory has a card, and one of a model that was not made from another."""
    stated = card_metadata(directory / CARD_NAME)
    return bool(stated) and "base_model" not in stated
