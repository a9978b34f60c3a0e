"""A Modelfile as Ollama's parser reads it, and the prompt that Ollama makes of a dialog by it.

Read in ollama/ollama @fb30760: parser/parser.go (`ParseFile`, `unquote`), server/routes.go (`ChatHandler` puts SYSTEM
before a dialog without a system message) and template/template.go (`collate` joins messages of one role).
"""

from collections.abc import Callable, Iterator


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Its instructions with their values: `FROM`, `TEMPLATE`, `SYSTEM`, and parameters as `PARAMETER stop`."""
    instructions = []
    characters = iter(text)
    while name := _first_word(characters):
        if name == "#":
            next((character for character in characters if character in "\r\n"), None)
            continue
        if name == "PARAMETER":
            name = f"PARAMETER {_first_word(characters)}"
        instructions.append((name, _value(characters)))
    return instructions


def ollama_prompt(
    modelfile: str, messages: list[dict[str, str]], render: Callable[[str, list[dict[str, str]]], str]
) -> str:
    """The text that a chat hands to the model, which puts BOS before it."""
    instructions = dict(read_modelfile(modelfile))
    return render(instructions["TEMPLATE"], ollama_messages(modelfile, messages))


def ollama_messages(modelfile: str, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages that the template is given."""
    system = dict(read_modelfile(modelfile)).get("SYSTEM")
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    collated: list[dict[str, str]] = []
    for message in messages:
        if collated and collated[-1]["role"] == message["role"]:
            content = f"{collated[-1]['content']}\n\n{message['content']}"
            collated[-1] = message | {"content": content}
        else:
            collated.append(message)
    return collated


def _first_word(characters: Iterator[str]) -> str:
    word = ""
    for character in characters:
        if character in " \t\r\n":
            if word:
                break
        elif character == "#" and not word:
            return "#"
        else:
            word += character
    return word


def _value(characters: Iterator[str]) -> str:
    value = ""
    for character in characters:
        if character in "\r\n" and (found := _unquoted(value.strip())) is not None:
            return found
        if character.isprintable() or character in " \t\r\n":
            value += character
    found = _unquoted(value.strip())
    assert found is not None, f"unexpected end in {value!r}"
    return found


def _unquoted(value: str) -> str | None:
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            is_closed = len(value) >= 2 * len(quotes) and value.endswith(quotes)
            return value[len(quotes) : -len(quotes)] if is_closed else None
    return value
