"""`tune run RECIPE --help`: every key with its type, default and effect, without importing torch.

Types and defaults are those of the settings class. The effects are the comments of a config file, which are written
nowhere else.
"""

import ast
import importlib
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

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


@dataclass(frozen=True)
class DescribedKey:
    """All that is known of a key.

    Attributes:
        name: dotted.
        section: the heading above it in the config.
        type_words: its values; empty: unknown.
        default: as a config spells it; None: it has none.
        here: its value in the config; None: it is not there, or a mapping of keys.
        effect: in words.
        also: further keys of its node, after the last of those in the config.
    """

    name: str
    section: str
    type_words: str
    default: str | None
    here: str | None
    effect: str
    also: tuple[str, ...] = ()


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
    sections: dict[str, list[str]] = {written_key.section: [] for written_key in written.values()}
    for key in described_keys(settings_type, written):
        sections.setdefault(key.section, []).extend(_entry(key))
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
            is_block = isinstance(value_node, yaml.CollectionNode) and not value_node.flow_style
            end = key_node.end_mark if is_block else value_node.end_mark
            is_block_mapping = is_block and isinstance(value_node, yaml.MappingNode)
            section = next((name for number, name in reversed(sections) if number < key_node.start_mark.line), "Keys")
            source = text[value_node.start_mark.index : value_node.end_mark.index].rstrip()
            value = None if is_block_mapping else source
            key = f"{prefix}{key_node.value}"
            yield key, WrittenKey(section, value, _comment(lines, end.line, end.column))
            if is_block_mapping:
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


def described_keys(settings_type: type[Settings], written: Mapping[str, WrittenKey]) -> Iterator[DescribedKey]:
    """Describe every key of a recipe, and the keys in its nodes that do not follow another key.

    Args:
        written: the keys of a config, where effects, sections and example values are taken from.
    """
    for name, field in settings_type.model_fields.items():
        here = written.get(name)
        section = here.section if here else _NO_SECTION
        words = type_words(field.annotation, field.metadata)
        default = None if field.is_required() else _shown(field.get_default())
        effect = (here.effect if here else "") or field.description or ""
        yield DescribedKey(name, section, words, default, here.value if here else None, effect)
        node = next((marker for marker in field.metadata if isinstance(marker, ComponentNode)), None)
        if node is not None and f"{name}._component_" in written:
            yield from _keys_in_node(name, node, written)


def _keys_in_node(name: str, node: ComponentNode, written: Mapping[str, WrittenKey]) -> list[DescribedKey]:
    component = written[f"{name}._component_"]
    parameters = {p.name: p for p in parameters_in_source(component.value or "") if p.name not in node.supplied}
    nested = {key.removeprefix(f"{name}."): value for key, value in written.items() if key.startswith(f"{name}.")}
    keys = [
        DescribedKey(f"{name}._component_", component.section, "dotted path", None, component.value, component.effect)
    ]
    for key, value in nested.items():
        if key == "_component_" or (value.value and _REFERENCE.fullmatch(value.value)):
            continue
        parameter = parameters.get(key)
        words = type_words(parameter.annotation) if parameter else ""
        default = _shown_source(parameter.default) if parameter and parameter.default else None
        keys.append(DescribedKey(f"{name}.{key}", value.section, words, default, value.value, value.effect))
    others = (f"{name}.{key}" for key in parameters if key not in nested and key not in ("self", "kwargs"))
    keys[-1] = replace(keys[-1], also=tuple(others))
    return keys


def _entry(key: DescribedKey) -> list[str]:
    parts = [key.type_words] if key.type_words else []
    if key.default is not None:
        parts.append(f"default {key.default}")
    if key.here is not None and key.here != key.default:
        parts.append(f"here {key.here}")
    lines = textwrap.wrap(
        f"{key.name}  {'; '.join(parts)}",
        WIDTH,
        initial_indent="  ",
        subsequent_indent="      ",
        break_on_hyphens=False,
    )
    lines += textwrap.wrap(
        key.effect, WIDTH, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False
    )
    if key.also:
        also = f"also: {', '.join(key.also)}"
        lines += textwrap.wrap(also, WIDTH, initial_indent="  ", subsequent_indent="      ")
    return lines


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
