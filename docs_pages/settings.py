"""docs/settings.md: every key of every recipe, from the settings classes and the comments of the configs."""

import re
from pathlib import Path

from custom_components.config.lora_settings import LoRASettings
from custom_components.config.recipe_files import config_named_in, docstring
from custom_components.config.recipe_help import DescribedKey, described_keys, settings_type_of, written_keys
from custom_components.config.training_settings import TrainingSettings
from docs_pages.blocks import PROJECT

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
        return text + (f", and these:\n{_table(keys, config)}" if keys else ".\n")
    for section in dict.fromkeys(key.section for key in keys):
        text += f"\n### {section}\n{_table([key for key in keys if key.section == section], config)}"
    return text


def _table(keys: list[DescribedKey], config: str) -> str:
    example = Path(config).name
    lines = ["", f"| key | values | default | in `{example}` | effect |", "| --- | --- | --- | --- | --- |"]
    for key in keys:
        here = "" if key.here in (None, key.default) else _code(key.here)
        cells = [
            _code(key.name),
            _plain(key.type_words),
            "" if key.default is None else _code(key.default),
            here,
            _plain(key.effect),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        if key.also:
            also = ", ".join(map(_code, key.also))
            lines.append(f"| | | | | further arguments of the component: {also} |")
    return "\n".join([*lines, ""])


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _plain(effect: str) -> str:
    """Escape what Markdown would read as a tag or as emphasis."""
    return re.sub(r"[<>*]|(?<!\w)_|_(?!\w)", lambda match: "\\" + match[0], effect)
