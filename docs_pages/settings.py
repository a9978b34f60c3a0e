"""docs/settings.md: every key of every recipe, from the settings classes and the comments of the configs."""

from pathlib import Path

from custom_components.config.lora_settings import LoRASettings
from custom_components.config.recipe_files import config_named_in, docstring
from custom_components.config.recipe_help import DescribedKey, described_keys, settings_type_of, written_keys
from custom_components.config.training_settings import TrainingSettings
from docs_pages.blocks import PROJECT, plain

_INTRODUCTION = """# Every key of a config

Made from the settings and from the comments in `configs/`, as `--help` is:

```
tune run recipes/lora_single_device.py --help
```

Every key can be set on the command line as `key=value`, nested ones dotted; `~key` deletes one. A key without a default
must be set. Keys that a config passes on to a component (`lora_rank: ${lora_rank}` in `model`) are listed once, at the
top level. Units are in the effect: tokens, rows, forwards, optimizer steps, minutes.
"""
_TRAINS = "lora_single_device"


def page() -> str:
    """Write docs/settings.md."""
    recipes = sorted(path for path in (PROJECT / "recipes").glob("[!_]*.py") if settings_type_of(path) is not None)
    recipes.sort(key=lambda path: path.stem != _TRAINS)
    return _INTRODUCTION + "".join(_recipe_section(recipe) for recipe in recipes)


def _recipe_section(recipe: Path) -> str:
    settings_type = settings_type_of(recipe)
    config = config_named_in(docstring(recipe))
    assert settings_type is not None and config is not None, recipe
    summary = docstring(recipe).strip().partition("\n")[0]
    text = f"\n## recipes/{recipe.name}\n\n{summary}\n\n"
    written = written_keys((PROJECT / config).read_text(encoding="utf-8"))
    settings_type = settings_type.for_config(written)
    keys = list(described_keys(settings_type, written))
    if issubclass(settings_type, TrainingSettings) and recipe.stem != _TRAINS:
        of_lora, fields = LoRASettings.model_fields, settings_type.model_fields
        absent = [name for name in of_lora if name not in fields]
        own = {name for name in fields if name not in of_lora or fields[name].metadata != of_lora[name].metadata}
        keys = [key for key in keys if key.name.partition(".")[0] in own]
        text += f"It has the keys of [recipes/{_TRAINS}.py](#recipes{_TRAINS}py)"
        text += f", without {', '.join(map(_code, absent))}" if absent else ""
        return text + (f", and these:\n{_table(keys)}" if keys else ".\n")
    for section in dict.fromkeys(key.section for key in keys):
        text += f"\n### {section}\n{_table([key for key in keys if key.section == section])}"
    return text


def _table(keys: list[DescribedKey]) -> str:
    lines = ["", "| key | values | default | effect |", "| --- | --- | --- | --- |"]
    for key in keys:
        cells = [_code(key.name), plain(key.type_words), _default(key), plain(key.effect)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        if key.also:
            also = ", ".join(map(_code, key.also))
            lines.append(f"| | | | further arguments of the component: {also} |")
    return "\n".join([*lines, ""])


def _default(key: DescribedKey) -> str:
    if key.default is not None:
        return _code(key.default)
    return f"must be set, such as {_code(key.here)}" if key.here else "must be set"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""
