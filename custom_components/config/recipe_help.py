"""`tune run RECIPE --help`: every key with its type, default and effect, without importing torch.

Types and defaults are those of the settings class. The effects are the comments of a config file, which are written
nowhere else.
"""

import ast
import importlib
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic.fields import FieldInfo

from custom_components.config.settings import ComponentNode, Settings
from custom_components.config.signatures import parameters_in_source
from custom_components.config.type_words import type_words

WIDTH = 80
_SECTION = re.compile(r"# -{2,} (.+?)[ -]*$")
_REFERENCE = re.compile(r"\$\{[\w.]+\}")
_NO_SECTION = "Other keys"


@dataclass(frozen=True)
class WrittenKey:
    """A key as it is written in a config.

    Attributes:
        section: the heading above it.
        value: its source text; None for a mapping of keys.
        effect: its comment.
    """

    section: str
    value: str | None
    effect: str


def recipe_help(description: str, settings_type: type[Settings], config: Path | None) -> str:
    """Write the text of `--help`.

    Args:
        description: the recipe's docstring: what it does, and commands to copy.
        settings_type: what the recipe reads.
        config: where effects, sections and example values are taken from; None: they are left out.
    """
    summary, _, rest = description.strip().partition("\n")
    written = written_keys(config.read_text(encoding="utf-8")) if config else {}
    settings_type = settings_type.for_config(written)
    sections: dict[str, list[str]] = {}
    for written_key in written.values():
        sections.setdefault(written_key.section, [])
    for name, field in settings_type.model_fields.items():
        section = written[name].section if name in written else _NO_SECTION
        sections.setdefault(section, []).extend(_described(name, field, written))
    lines = [
        *textwrap.wrap(summary, WIDTH),
        "",
        *(part for line in rest.strip().splitlines() for part in _wrapped(line)),
    ]
    words = (
        "Every key can be set as key=value, nested ones dotted; ~key deletes one. A key without a default must be set."
    )
    if config:
        words += f" 'here' is its value in {config}, where keys that follow another one (${{key}}) are not listed."
    lines += ["", *textwrap.wrap(words, WIDTH, break_on_hyphens=False)]
    for section, described in sections.items():
        lines += ["", *textwrap.wrap(section, WIDTH), *described] if described else []
    return "\n".join(lines)


def settings_type_of(recipe: Path) -> type[Settings] | None:
    """Find the class that a recipe passes to `load_settings`; None where it is not one of this package."""
    try:
        tree = ast.parse(recipe.read_bytes())
    except (SyntaxError, ValueError):
        return None
    modules = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("custom_components.config.")
        for alias in node.names
    }
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name("load_settings"), args=[ast.Name(id=name), *_]) if name in modules:
                module, class_name = modules[name]
                return getattr(importlib.import_module(module), class_name, None)
    return None


def written_keys(text: str) -> dict[str, WrittenKey]:
    """Collect the keys of a config by dotted path, in order; empty for a text that is not a config."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return {}
    lines = text.splitlines()
    sections = [(number, match[1]) for number, line in enumerate(lines) if (match := _SECTION.match(line))]

    def keys_of(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, WrittenKey]]:
        for key_node, value_node in node.value if isinstance(node, yaml.MappingNode) else ():
            is_block = isinstance(value_node, yaml.MappingNode) and not value_node.flow_style
            end = key_node.end_mark if is_block else value_node.end_mark
            section = next((name for number, name in reversed(sections) if number < key_node.start_mark.line), "Keys")
            value = None if is_block else text[value_node.start_mark.index : value_node.end_mark.index]
            key = f"{prefix}{key_node.value}"
            yield key, WrittenKey(section, value, _comment(lines, end.line, end.column))
            if is_block:
                yield from keys_of(value_node, f"{key}.")

    return dict(keys_of(root, ""))


def _comment(lines: list[str], line: int, column: int) -> str:
    """Read the comment after a value, with the comment lines below it that begin in the same column."""
    if line >= len(lines) or "#" not in lines[line][column:]:
        return ""
    start = lines[line].index("#", column)
    parts = [lines[line][start + 1 :]]
    for below in lines[line + 1 :]:
        if start == 0 or below[: start + 1].strip() != "#" or below.index("#") != start:
            break
        parts.append(below[start + 1 :])
    return " ".join(part.strip() for part in parts)


def _described(name: str, field: FieldInfo, written: dict[str, WrittenKey]) -> list[str]:
    """Write the lines of a key and of the keys in it."""
    node = next((marker for marker in field.metadata if isinstance(marker, ComponentNode)), None)
    words = type_words(field.annotation, field.metadata)
    default = None if field.is_required() else _shown(field.get_default())
    here = written.get(name)
    effect = (here.effect if here else "") or field.description or ""
    lines = _entry(name, words, default, here.value if here else None, effect)
    component = written.get(f"{name}._component_")
    if node is None or component is None:
        return lines
    lines += _entry(f"{name}._component_", "dotted path", None, component.value, component.effect)
    parameters = {p.name: p for p in parameters_in_source(component.value or "") if p.name not in node.supplied}
    nested = {key.removeprefix(f"{name}."): value for key, value in written.items() if key.startswith(f"{name}.")}
    for key, value in nested.items():
        if key == "_component_" or (value.value and _REFERENCE.fullmatch(value.value)):
            continue
        parameter = parameters.get(key)
        words = type_words(parameter.annotation) if parameter else ""
        default = _shown_source(parameter.default) if parameter and parameter.default else None
        lines += _entry(f"{name}.{key}", words, default, value.value, value.effect)
    others = [f"{name}.{key}" for key in parameters if key not in nested and key not in ("self", "kwargs")]
    if others:
        lines += textwrap.wrap(f"also: {', '.join(others)}", WIDTH, initial_indent="  ", subsequent_indent="      ")
    return lines


def _entry(key: str, words: str, default: str | None, here: str | None, effect: str) -> list[str]:
    parts = [words] if words else []
    if default is not None:
        parts.append(f"default {default}")
    if here is not None and here != default:
        parts.append(f"here {here}")
    head = textwrap.wrap(
        f"{key}  {'; '.join(parts)}", WIDTH, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False
    )
    body = textwrap.wrap(effect, WIDTH, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False)
    return [*head, *body]


def _wrapped(line: str) -> list[str]:
    """Wrap a line of a docstring; a command is continued with backslashes."""
    if not line.startswith("tune run"):
        return textwrap.wrap(line, WIDTH) or [""]
    parts = textwrap.wrap(line, WIDTH - 2, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
    return [*(f"{part} \\" for part in parts[:-1]), parts[-1]]


def _shown(default: object) -> str:
    """Spell a default as a config does."""
    return str(default) if isinstance(default, str | Path) and str(default) else json.dumps(default, default=str)


def _shown_source(default: str) -> str:
    """Do the same for a default as Python's source spells it."""
    try:
        return _shown(ast.literal_eval(default))
    except (ValueError, SyntaxError):
        return default
