"""Rendering a checkpoint's Jinja chat template, as transformers does (utils/chat_template_utils.py).

The template is a stranger's program: it runs in Jinja's sandbox, without the clock.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which templates mark answers for transformers; it writes nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render_chat(
    template: str, messages: Sequence[Mapping[str, str]], names: Mapping[str, str], *, is_open: bool
) -> str:
    """Render a dialog.

    Args:
        names: the texts of tokens by transformers' names, such as `bos_token`.
        is_open: end with the start of an answer, transformers' `add_generation_prompt`.

    Raises:
        ValueError: the template refuses the dialog, or is not one.
    """
    try:
        return _compiled(template).render(messages=messages, add_generation_prompt=is_open, **names)
    except jinja2.TemplateError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except Exception as error:  # noqa: BLE001 - a template may fail in any way
        raise ValueError(f"{type(error).__name__}: {error}") from None


@cache
def _compiled(template: str) -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)
