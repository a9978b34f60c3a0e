"""A prompt format as a Jinja chat template, for transformers and tools that read its files.

The rendered text has the tokens of :class:`ChatTransform`, with the tokenizer of :mod:`tokenizer_json`.
"""

import json
from collections.abc import Sequence

from custom_components.transforms.jinja_dialogs import JinjaTemplate
from custom_components.transforms.marked_template import MarkedTemplate
from custom_components.transforms.templates import LLAMA2_TAGS, default_system_prompt, prompt_template

# note: every tag strips the line break before it, so that only expressions add text to the prompt.
_START = """\
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] %}
{%- set dialog = messages[1:] %}
{%- else %}
{%- set system = default_system %}
{%- set dialog = messages %}
{%- endif %}
{%- for message in messages %}
{%- for mark in marks %}
{%- if mark in message['content'] %}
{{- raise_exception('a message contains ' + mark + ', which is how the chat format marks its parts') }}
{%- endif %}
{%- endfor %}
{%- endfor %}
{%- for message in dialog %}
{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}
{{- raise_exception('after an optional system message, user and assistant have to take turns') }}
{%- endif %}
"""
_LLAMA2_TURN = """\
{%- if message['role'] == 'user' %}
{%- set content = message['content'] %}
{%- if loop.first and system is not none %}
{%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + content %}
{%- endif %}
{{- bos + '[INST] ' + (content | trim) + ' [/INST]' }}
{%- else %}
{{- ' ' + (message['content'] | trim) + ' ' + eos }}
{%- endif %}
"""
# A prompt that is left open loses the spaces at its end: they belong to the answer's first word.
_MARKED_TURN = """\
{%- if message['role'] == 'user' %}
{%- set prompt = before_user + message['content'] + before_answer %}
{%- if loop.first and system is not none %}
{%- set prompt = before_system + system + after_system + prompt %}
{%- endif %}
{{- bos + (prompt.rstrip(' ') if loop.last else prompt) }}
{%- else %}
{{- message['content'] + after_answer + eos }}
{%- endif %}
"""
# For templates that name BOS and EOS themselves.
_QUESTION = """\
{%- set prompt = before_user + content + before_answer %}
{%- if loop.first and system is not none %}
{%- set prompt = before_system + (systemSTRIPPED) + after_system + prompt %}
{%- endif %}
"""
_QUESTION_WITH_SYSTEM_INSIDE = """\
{%- if system and HAS_SYSTEM %}
{%- set content = before_system + (systemSTRIPPED) + after_system + content %}
{%- endif %}
{%- set prompt = before_user + content + before_answer %}
"""
_NAMED_TURN = """\
{%- if message['role'] == 'user' %}
{%- set content = message['content']STRIPPED %}
QUESTION\
{%- if loop.first %}
{%- set prompt = start + prompt %}
{%- endif %}
{{- prompt.rstrip(' ') if loop.last else prompt }}
{%- else %}
{{- (message['content']ANSWER_STRIPPED) + after_answer + trailer }}
{%- endif %}
"""
_END = "{%- endfor %}"


def chat_template(
    description: str | dict[str, str],
    system_prompt: str | None,
    control_pieces: dict[str, str],
    added_tokens: Sequence[str] = (),
) -> str:
    """Write the Jinja template of a prompt format.

    A message that contains the text of a control token or an added one, or one of Llama 2's tags, is refused: whatever
    reads the rendered text would take it for the token.

    Args:
        description: a template's name or parts, as :func:`prompt_template` takes them.
        system_prompt: for dialogs that have none of their own.
        control_pieces: see :attr:`Tokenizer.named_pieces`.
        added_tokens: the texts of the tokens that the checkpoint's files add.

    Raises:
        UserError: no such template.
    """
    bos, eos = control_pieces.get("bos_token", ""), control_pieces["eos_token"]
    template = prompt_template(description)
    if isinstance(template, JinjaTemplate):
        return template.source
    constants: dict[str, str | None | list[str]] = {
        "bos": bos,
        "eos": eos,
        "marks": [*control_pieces.values(), *added_tokens],
        "default_system": default_system_prompt(description, system_prompt),
    }
    if isinstance(template, MarkedTemplate):
        template = template.with_names(bos, eos, added_tokens)
        turn = _named_turn(template) if template.names_ends else _MARKED_TURN
        constants |= template.marks_with(bos, eos)
    else:
        turn = _LLAMA2_TURN
        constants["marks"] = [*control_pieces.values(), *added_tokens, *LLAMA2_TAGS]
    definitions = "".join(f"{{%- set {name} = {_literal(value)} %}}\n" for name, value in constants.items())
    return definitions + _START + turn + _END


def _named_turn(template: MarkedTemplate) -> str:
    """Write the part of the template for each message, of a template that names BOS and EOS itself."""
    question = _QUESTION if template.system_place == "before" else _QUESTION_WITH_SYSTEM_INSIDE
    # The last question of a dialog is its last message, or that before the answer to it.
    has_system = "loop.first" if template.system_place == "first_user" else "loop.index >= dialog | length - 1"
    words = {
        "QUESTION": question,
        "HAS_SYSTEM": has_system,
        "ANSWER_STRIPPED": {"all": " | trim", "spaces_after_answers": ".rstrip(' ')"}.get(template.strips, ""),
        "STRIPPED": " | trim" if template.strips == "all" else "",
    }
    turn = _NAMED_TURN
    for word, text in words.items():
        turn = turn.replace(word, text)
    return turn


def _literal(value: str | None | list[str]) -> str:
    # Jinja's literals have JSON's escapes, except for characters beyond 16 bits, which are kept as they are.
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
