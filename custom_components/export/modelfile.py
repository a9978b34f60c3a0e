"""The Modelfile beside a GGUF file: a prompt format as Ollama needs it.

Not every Ollama runs the Jinja template in the file: before 0.30 it only compared it with a list of its own. Llama 2's
usual spelling is in that list, but is replaced by a Go template with other tokens: empty `<<SYS>>` marks in every turn,
and no space before `</s>`. (The demo's model then answers 495 of 510 questions, instead of all.) So the file keeps our
spelling, and the Modelfile has the Go template.

Format: ollama/ollama @fb30760, docs/modelfile.mdx, parser/parser.go; the list: template/index.json.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from custom_components.runtime.terminal import say
from custom_components.transforms.go_template import go_template
from custom_components.transforms.jinja_dialogs import JinjaTemplate
from custom_components.transforms.prompt_format import PromptFormat
from custom_components.transforms.templates import default_system_prompt, prompt_template

MODELFILE_NAME = "Modelfile"
_HEAD = """\
# For Ollama: ollama create NAME -f Modelfile
FROM ./{gguf_name}
"""
# Ollama's own defaults draw at temperature 0.8, and those of older releases penalize repetition.
_SAMPLING = """\
# As generate.py answers by default: always the likeliest token. Delete both lines for Ollama's own defaults.
PARAMETER temperature 0
PARAMETER repeat_penalty 1
"""


def write_modelfile(
    directory: Path,
    gguf_name: str,
    prompt_format: PromptFormat | None,
    control_pieces: Mapping[str, str],
    added_tokens: Sequence[str] = (),
) -> None:
    """Write a Modelfile that gives the tokens of a prompt format, or say why there is none.

    Args:
        gguf_name: the model's file in the same directory.
        prompt_format: None: it is not known.
        control_pieces, added_tokens: see :func:`go_template`.
    """
    if prompt_format is None:
        say(
            f"no {MODELFILE_NAME} is written: no prompt format is stated, and a Jinja template cannot be put into "
            "Ollama's language; Ollama 0.30 and later run the one in the file, if there is one, from a line `FROM`"
        )
    elif isinstance(prompt_template(prompt_format.prompt_template), JinjaTemplate):
        print(
            f"no {MODELFILE_NAME} is written: a Jinja template of a checkpoint cannot be put into Ollama's language; "
            "Ollama 0.30 and later run the one in the file, from a line `FROM`"
        )
    elif not gguf_name.isprintable():
        say(f"no {MODELFILE_NAME} is written: it cannot name {gguf_name!r}; give output_dir a printable name")
    else:
        text = modelfile(gguf_name, prompt_format, control_pieces, added_tokens)
        (directory / MODELFILE_NAME).write_text(text, encoding="utf-8")


def modelfile(
    gguf_name: str, prompt_format: PromptFormat, control_pieces: Mapping[str, str], added_tokens: Sequence[str] = ()
) -> str:
    """Write the text of a Modelfile.

    Raises:
        UserError: no such template.
    """
    system = default_system_prompt(prompt_format.prompt_template, prompt_format.system_prompt)
    # Ollama takes an empty SYSTEM for none.
    is_instruction = system is not None and system != "" and _can_be_quoted(system)
    written_system = None if is_instruction else system
    template = go_template(prompt_format.prompt_template, control_pieces, written_system, added_tokens)
    return "".join(
        [
            _HEAD.format(gguf_name=gguf_name),
            f'TEMPLATE """{template}"""\n',
            f'SYSTEM """{system}"""\n' if is_instruction else "",
            *_stops(prompt_format.stop_tokens),
            _SAMPLING,
        ]
    )


def _stops(pieces: Sequence[str]) -> list[str]:
    """Write stop tokens as texts, for releases that decode control tokens; they end an answer as tokens too."""
    return [f'PARAMETER stop "{piece}"\n' for piece in pieces if piece.isprintable()]


def _can_be_quoted(text: str) -> bool:
    """Whether Ollama's parser keeps a text between three quotes as it is; it drops what is not printable."""
    return '"""' not in text and all(character.isprintable() or character in "\t\n\r" for character in text)
