"""The chat template that a checkpoint comes with: which of the built-in ones it is, or how it can be used itself."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tokenizers

from custom_components.runtime.errors import UserError
from custom_components.runtime.text_files import read_text
from custom_components.transforms.added_tokens import read_json
from custom_components.transforms.dialogs import ChatMessage, with_system_message
from custom_components.transforms.jinja_dialogs import JinjaTemplate
from custom_components.transforms.jinja_rendering import render_chat
from custom_components.transforms.marked_template import MarkedTemplate
from custom_components.transforms.templates import TEMPLATES, PromptTemplate
from custom_components.transforms.tokenizer import Tokenizer
from custom_components.transforms.turn_encoding import encode_turns
from custom_components.transforms.turns import Markup, Turn, text_of

# Dialogs that formats write differently: spaces around a question, one to three exchanges, open and closed ones.
_EXCHANGES = [
    ("user", " Why is\n it so?\n"),
    ("assistant", "So, 12.5\n\nIt is."),
    ("user", "And  é漢?"),
    ("assistant", "Yes."),
    ("user", "Ok"),
]
_MOST_TEMPLATE_BYTES = 2**20
_SYSTEM = "Be kind.\nBe brief."


@dataclass(frozen=True)
class OwnTemplate:
    """A checkpoint's Jinja chat template.

    Attributes:
        name: of the built-in template that gives the same ids; None: none does.
        system_prompt: what that needs as system prompt of dialogs that have none; None: nothing.
    """

    source: str
    name: str | None = None
    system_prompt: str | None = None


def source_template(source_dir: Path) -> str | None:
    """Read the chat template that a checkpoint comes with, if any."""
    if (source_dir / "chat_template.jinja").exists():
        try:
            return read_text(source_dir / "chat_template.jinja", _MOST_TEMPLATE_BYTES)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{source_dir / 'chat_template.jinja'}: cannot be read ({error}); download it again"
            ) from None
    template = read_json(source_dir / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


def own_template(tokenizer: Tokenizer) -> OwnTemplate | None:
    """Read a checkpoint's chat template and recognize it by the ids of a few dialogs; None: it has none."""
    source = source_template(tokenizer.path.parent)
    if source is None:
        return None
    names = named_tokens(tokenizer)
    for ids_of in _ways_to_tokenize(tokenizer):
        for name, template in TEMPLATES.items():
            bound = with_tokens_of(template, tokenizer)
            if bound is not None and name != "none":
                found = _same_format(source, names, bound, tokenizer, ids_of)
                if found is not None:
                    return OwnTemplate(source, name, found.system_prompt)
    return OwnTemplate(source)


def with_tokens_of(template: PromptTemplate, tokenizer: Tokenizer) -> PromptTemplate | None:
    """Make a template that names a tokenizer's control tokens; None: the tokenizer has not all that it needs."""
    if isinstance(template, MarkedTemplate) and set(template.control_tokens) - set(tokenizer.control_ids):
        return None
    if isinstance(template, MarkedTemplate):
        return template.with_names(tokenizer.bos_piece, tokenizer.eos_piece, tuple(tokenizer.control_ids))
    if isinstance(template, JinjaTemplate):
        return replace(template, names=named_tokens(tokenizer), control_tokens=tuple(tokenizer.control_ids))
    return template


def named_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Give the texts of tokens by the names that transformers gives a template: what the checkpoint calls so wins."""
    return {"bos_token": "", **tokenizer.named_pieces, **tokenizer.added_tokens.names}


@dataclass(frozen=True)
class _Found:
    system_prompt: str | None = None


def _same_format(
    source: str,
    names: dict[str, str],
    template: PromptTemplate,
    tokenizer: Tokenizer,
    ids_of: Callable[[str], list[int]],
) -> _Found | None:
    """Tell whether a Jinja template gives the ids of a template, and with which system prompt of its own.

    A dialog that the Jinja template refuses, as some do system prompts, says nothing; but one has to be accepted.
    """

    def differs(dialog: Sequence[ChatMessage], system_prompt: str | None = None) -> bool:
        try:
            rendered = _render(source, dialog, names)
        except ValueError:
            return False
        turns = template(with_system_message(dialog, system_prompt))
        [(ours, _)] = encode_turns(tokenizer, [turns], trains_prompts=False)
        return ids_of(rendered) != ours

    try:
        first = _render(source, _dialog(1), names)
    except ValueError:
        return None
    if any(differs(dialog) for dialog in _dialogs(has_system=True)):
        return None
    if not any(differs(dialog) for dialog in _dialogs(has_system=False)):
        return _Found()
    default = _default_system(first, template, names)
    if default is None or any(differs(dialog, default) for dialog in _dialogs(has_system=False)):
        return None
    return _Found(default)


def _default_system(rendered: str, template: PromptTemplate, names: dict[str, str]) -> str | None:
    """Find the system prompt with which a template writes a rendered dialog."""
    place = "\ue000"
    turns = template([ChatMessage("system", place), *_dialog(1)])
    before, _, after = text_of(turns, names["bos_token"], names["eos_token"]).partition(place)
    if not (rendered.startswith(before) and rendered.endswith(after)) or len(rendered) < len(before) + len(after):
        return None
    return rendered[len(before) : len(rendered) - len(after)]


def _ways_to_tokenize(tokenizer: Tokenizer) -> Iterator[Callable[[str], list[int]]]:
    """Give functions that tokenize a rendered text: as here, and as the tokenizer.json beside it does."""

    def by_us(text: str) -> list[int]:
        [(ids, _)] = encode_turns(tokenizer, [[Turn((Markup(text),), None)]], trains_prompts=False)
        return ids

    yield by_us
    path = tokenizer.path.parent / "tokenizer.json"
    if path != tokenizer.path and path.is_file():
        try:
            theirs = tokenizers.Tokenizer.from_file(str(path))
        except Exception:  # noqa: BLE001 - the package raises nothing more special
            raise UserError(f"{path}: not a tokenizer.json; download it again") from None
        yield lambda text: theirs.encode(text, add_special_tokens=False).ids


def _render(source: str, dialog: Sequence[ChatMessage], names: dict[str, str]) -> str:
    messages = [{"role": message.role, "content": message.content} for message in dialog]
    return render_chat(source, messages, names, is_open=dialog[-1].role == "user")


def _dialogs(*, has_system: bool) -> Iterator[list[ChatMessage]]:
    for num_messages in range(1, len(_EXCHANGES) + 1):
        yield _dialog(num_messages, has_system=has_system)


def _dialog(num_messages: int, *, has_system: bool = False) -> list[ChatMessage]:
    system = [ChatMessage("system", _SYSTEM)] if has_system else []
    return system + [ChatMessage(role, content) for role, content in _EXCHANGES[:num_messages]]
