"""A prompt format as a Jinja chat template, for transformers and tools that read its files.

The rendered text has the tokens of :class:`Llama2ChatTransform`, with the tokenizer of :mod:`tokenizer_json`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from custom_components.transforms.templates import LLAMA2_TAGS, MarkedTemplate, default_system_prompt, prompt_template

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
        control_pieces: see :func:`control_pieces_of`.
        added_tokens: the texts of the tokens that the checkpoint's files add.

    Raises:
        UserError: no such template.
    """
    template = prompt_template(description)
    constants: dict[str, str | None | list[str]] = {
        "bos": control_pieces["bos_token"],
        "eos": control_pieces["eos_token"],
        "marks": [*control_pieces.values(), *added_tokens],
        "default_system": default_system_prompt(description, system_prompt),
    }
    if isinstance(template, MarkedTemplate):
        turn = _MARKED_TURN
        constants |= template.marks
    else:
        turn = _LLAMA2_TURN
        constants["marks"] = [*control_pieces.values(), *added_tokens, *LLAMA2_TAGS]
    definitions = "".join(f"{{%- set {name} = {_literal(value)} %}}\n" for name, value in constants.items())
    return definitions + _START + turn + _END


def control_pieces_of(tokenizer_model: Path) -> dict[str, str]:
    """Read the texts of a SentencePiece model's control tokens, by transformers' names for them."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    return {name: processor.id_to_piece(index) for name, index in ids.items()}


def _literal(value: str | None | list[str]) -> str:
    # Jinja's literals have JSON's escapes, except for characters beyond 16 bits, which are kept as they are.
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
