"""A prompt format as a template of Go's text/template, the language in which Ollama renders prompts.

What the template renders has the tokens of :class:`ChatTransform`, after the BOS that Ollama puts before it.

The part of the language that is used (pkg.go.dev/text/template): the data `.Messages`, each with `.Role` and
`.Content`; string literals, `true` and `false`; variables with `:=` and `=`; `if`, `else if`, `else`, `range`, `end`;
`define` and `template`; the functions `and`, `eq`, `ge`, `len`, `print` and `slice`; `{{-`, which strips the space
before it.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence

from custom_components.transforms.marked_template import MarkedTemplate
from custom_components.transforms.templates import prompt_template
from custom_components.transforms.turns import BOS, EOS

# What Python's str.strip() strips.
_WHITESPACE = "".join(character for character in map(chr, range(sys.maxunicode + 1)) if character.isspace())
# note: every tag strips the line break before it, so that only expressions add text to the prompt.
_START = """\
{{- $has_user := false }}
{{- $has_answer := false }}
{{- range $index, $message := .Messages }}
{{- if eq .Role "system" }}
{{- $system = .Content }}
{{- $has_system = true }}
{{- else if eq .Role "user" }}
{{- if $has_answer }}{{ $bos }}{{ end }}
"""
_LLAMA2_PROMPT = """\
{{- $prompt := .Content }}
{{- if $has_system }}
{{- $prompt = print "<<SYS>>\\n" $system "\\n<</SYS>>\\n\\n" .Content }}
{{- end }}
{{- "[INST] " }}{{ template "strip" $prompt }}{{ " [/INST]" }}
"""
# The spaces at the end of the last prompt are left out: they belong to the answer's first word.
_MARKED_PROMPT = """\
{{- $prompt := print $before_user .Content $before_answer }}
{{- if $has_system }}
{{- $prompt = print $before_system $system $after_system $prompt }}
{{- end }}
{{- if eq (len (slice $.Messages $index)) 1 }}{{ template "strip_end" $prompt }}{{ else }}{{ $prompt }}{{ end }}
"""
# A dialog that is too long loses its first messages, and may begin with an answer, which is left out too.
_ANSWER = """\
{{- $has_system = false }}
{{- $has_user = true }}
{{- else if and $has_user (eq .Role "assistant") }}
{{- $has_answer = true }}
"""
_LLAMA2_ANSWER = '{{- " " }}{{ template "strip" .Content }}{{ " " }}{{ $eos }}\n'
_MARKED_ANSWER = "{{- .Content }}{{ $after_answer }}{{ $eos }}\n"
# For templates that name BOS and EOS themselves; Ollama puts the first BOS of a prompt there itself.
_NAMED_START = """\
{{- else if eq .Role "user" }}
{{- if $has_answer }}{{ else }}{{ $start }}{{ end }}
"""
_NAMED_PROMPT = """\
{{- $prompt := print $before_user .Content $before_answer }}
{{- if $has_system }}
{{- $prompt = print $before_system $system $after_system $prompt }}
{{- end }}
"""
_NAMED_PROMPT_WITH_SYSTEM_INSIDE = """\
{{- $prompt := print $before_user .Content $before_answer }}
{{- if and $has_system $system IS_ITS_PLACE }}
{{- $prompt = print $before_user $before_system $system $after_system .Content $before_answer }}
{{- end }}
"""
_OPEN_END = """\
{{- if eq (len (slice $.Messages $index)) 1 }}{{ template "strip_end" $prompt }}{{ else }}{{ $prompt }}{{ end }}
"""
_STRIPPED_PROMPT = """\
{{- if $has_system }}{{ $before_system }}{{ template "strip" $system }}{{ $after_system }}{{ end }}
{{- $before_user }}{{ template "strip" .Content }}{{ $before_answer }}
"""
_ANSWER_IS_NEXT = """\
{{- $has_user = true }}
{{- else if and $has_user (eq .Role "assistant") }}
{{- $has_answer = true }}
"""
_NAMED_ANSWER = "{{- CONTENT }}{{ $after_answer }}{{ $trailer }}\n"
_END = "{{- end }}\n{{- end }}"


def go_template(
    description: str | Mapping[str, str],
    control_pieces: Mapping[str, str],
    system_prompt: str | None,
    added_tokens: Sequence[str] = (),
) -> str:
    """Write the Go template of a prompt format.

    Args:
        description: a template's name or parts, as :func:`prompt_template` takes them.
        control_pieces: see :attr:`Tokenizer.named_pieces`.
        system_prompt: for dialogs that have none of their own; None: they get none.
        added_tokens: the texts of the tokens that the checkpoint's files add.

    Raises:
        UserError: no such template.
    """
    bos, eos = control_pieces.get("bos_token", ""), control_pieces["eos_token"]
    template = prompt_template(description)
    constants: dict[str, str | bool] = {
        "bos": bos,
        "eos": eos,
        "system": system_prompt or "",
        "has_system": system_prompt is not None,
    }
    start, next_answer = _START, _ANSWER
    if isinstance(template, MarkedTemplate):
        template = template.with_names(bos, eos, added_tokens)
        strips = _strip_end(" ")
        prompt, answer = _MARKED_PROMPT, _MARKED_ANSWER
        constants |= template.marks_with(bos, eos)
        if template.names_ends:
            constants["start"] = (template.start or "").removeprefix(BOS).replace(EOS, eos)
            start = _START.partition('{{- else if eq .Role "user" }}')[0] + _NAMED_START
            prompt, answer = _named_prompt(template), _named_answer(template)
            if template.strips == "all":
                strips = _strip(_WHITESPACE) + _strip_end(_WHITESPACE)
            if template.system_place == "last_user":
                next_answer = _ANSWER_IS_NEXT
    else:
        strips = _strip(_WHITESPACE) + _strip_end(_WHITESPACE)
        prompt, answer = _LLAMA2_PROMPT, _LLAMA2_ANSWER
    definitions = "".join(f"{{{{- ${name} := {_literal(value)} }}}}\n" for name, value in constants.items())
    return strips + definitions + start + prompt + next_answer + answer + _END


def _named_prompt(template: MarkedTemplate) -> str:
    """Write the part for a question, of a template that names BOS and EOS itself."""
    if template.strips == "all":
        return _STRIPPED_PROMPT
    if template.system_place == "before":
        return _NAMED_PROMPT + _OPEN_END
    is_last = "(ge 2 (len (slice $.Messages $index)))"  # the last message, or that before the answer to it
    place = "" if template.system_place == "first_user" else is_last
    return _NAMED_PROMPT_WITH_SYSTEM_INSIDE.replace(" IS_ITS_PLACE", f" {place}".rstrip()) + _OPEN_END


def _named_answer(template: MarkedTemplate) -> str:
    content = {"all": 'template "strip" .Content', "spaces_after_answers": 'template "strip_end" .Content'}
    return _NAMED_ANSWER.replace("CONTENT", content.get(template.strips, ".Content"))


def _strip(characters: str) -> str:
    """A template that writes its text without such characters at the start and the end."""
    cases = [
        f"if and (ge (len .) {width}) (eq (slice . 0 {width}) {literals}) }}}}"
        f'{{{{ template "strip" (slice . {width}) }}}}\n'
        for width, literals in _literals_by_width(characters)
    ]
    return _recursive("strip", cases, '{{ template "strip_end" . }}')


def _strip_end(characters: str) -> str:
    # There is no subtraction: the length of what a slice leaves is the place where the last bytes begin.
    cases = [
        f"if and (ge (len .) {width}) (eq (slice . (len (slice . {width}))) {literals}) }}}}"
        f'{{{{ template "strip_end" (slice . 0 (len (slice . {width}))) }}}}\n'
        for width, literals in _literals_by_width(characters)
    ]
    return _recursive("strip_end", cases, "{{ . }}")


def _recursive(name: str, cases: list[str], otherwise: str) -> str:
    body = "{{- " + "{{- else ".join(cases) + f"{{{{- else }}}}{otherwise}\n"
    return f'{{{{- define "{name}" }}}}\n{body}{{{{- end }}}}\n{{{{- end }}}}\n'


def _literals_by_width(characters: str) -> list[tuple[int, str]]:
    """Go slices texts by bytes: the characters of each width, as literals."""
    literals = defaultdict(list)
    for character in characters:
        literals[len(character.encode())].append(_literal(character))
    return [(width, " ".join(of_width)) for width, of_width in sorted(literals.items())]


def _literal(value: str | bool) -> str:
    """A literal in printable characters: the parser of Modelfiles drops others without a word."""
    # Go's literals have JSON's escapes.
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(character if character.isprintable() else _escape(ord(character)) for character in quoted)


def _escape(number: int) -> str:
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
