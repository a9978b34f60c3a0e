"""The `_component_` paths of older configs, read as those of today."""

from typing import Any

# By the start of the dotted path. Before the rooms, `custom_components` was flat.
RENAMED_PATHS = {
    "custom_components.builders.": "custom_components.models.",
    "custom_components.lora.": "custom_components.models.",
    "custom_components.schedules.": "custom_components.training.schedules.",
    "custom_components.loss.": "custom_components.training.loss.",
}


def rename_components(values: Any) -> dict[str, str]:
    """Give every `_component_` of a config, at any depth, the path it has today, in place.

    Returns:
        today's path by the one that was found.
    """
    renamed: dict[str, str] = {}
    if isinstance(values, list):
        for item in values:
            renamed |= rename_components(item)
    elif isinstance(values, dict):
        for key, value in values.items():
            if key == "_component_" and isinstance(value, str) and (today := _path_today(value)) != value:
                values[key] = renamed[value] = today
            else:
                renamed |= rename_components(value)
    return renamed


def _path_today(path: str) -> str:
    for before, today in RENAMED_PATHS.items():
        if path.startswith(before):
            return today + path.removeprefix(before)
    return path
