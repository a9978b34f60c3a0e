"""Tokens that a run adds to a checkpoint's tokenizer, and reading them again from beside its adapter."""

from collections.abc import Sequence
from pathlib import Path

from custom_components.runtime.errors import UserError
from custom_components.transforms.added_tokens import AddedTokens, read_added_tokens
from custom_components.transforms.jinja_dialogs import JinjaTemplate
from custom_components.transforms.json_tokenizer import JsonTokenizer
from custom_components.transforms.marked_template import MarkedTemplate
from custom_components.transforms.templates import PromptTemplate
from custom_components.transforms.tokenizer import Tokenizer


def with_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokenizer:
    """Add the tokens that a tokenizer lacks, with the ids that follow its own."""
    lacking = [text for text in texts if tokenizer.id_of(text) is None]
    return tokenizer.with_new_tokens(lacking) if lacking else tokenizer


def with_tokens_beside(tokenizer: Tokenizer, adapter_dir: Path) -> Tokenizer:
    """Add the tokens of the tokenizer's files beside an adapter, if there are any; theirs replace those of one id.

    Raises:
        UserError: a damaged file, or ids that this tokenizer cannot give.
    """
    if isinstance(tokenizer, JsonTokenizer):
        beside = read_added_tokens(adapter_dir, 0)
        extended = with_tokens(tokenizer, [token.text for token in beside.tokens])
        if other := [token for token in beside.tokens if extended.id_of(token.text) != token.index]:
            text, theirs, ours = other[0].text, other[0].index, extended.id_of(other[0].text)
            raise UserError(
                f"{adapter_dir}: its token {text!r} is {theirs}, here {ours}; is this the tokenizer of its base?"
            )
        return extended
    known, beside = tokenizer.added_tokens, read_added_tokens(adapter_dir, tokenizer.num_pieces)
    if not beside.tokens:
        return tokenizer
    replaced = {token.index for token in beside.tokens}
    kept = [token for token in known.tokens if token.index not in replaced and token.text not in beside.ids]
    tokens = tuple(sorted([*kept, *beside.tokens], key=lambda token: token.index))
    other_special = tuple(dict.fromkeys([*known.other_special, *beside.other_special]))
    return tokenizer.with_added_tokens(AddedTokens(tokens, {**known.names, **beside.names}, other_special))


def check_that_rows_have_tokens(texts: Sequence[str], template: PromptTemplate, tokenizer: Tokenizer) -> None:
    """Refuse to train tokens that no row has.

    Raises:
        UserError: a control token that the template does not name; in a message it would be text.
    """
    named = template.texts if isinstance(template, MarkedTemplate) else ()
    if isinstance(template, JinjaTemplate):
        named = (template.source,)
    ends = {tokenizer.bos_piece, tokenizer.eos_piece}
    controls = [text for text in texts if text in tokenizer.control_ids and text not in ends]
    if unseen := [text for text in controls if not any(text in part for part in named)]:
        raise UserError(
            f"trainable_tokens: the prompt template does not name {unseen[0]!r}, and in a message it is only text: no "
            "row would have it. Choose a template that does, such as chatml for <|im_start|> and <|im_end|>, or write "
            "one"
        )


def new_tokens_note(before: Tokenizer, after: Tokenizer) -> str:
    """Name the tokens that one tokenizer has in addition to the other, with their ids; "": there are none."""
    new = [token for token in after.added_tokens.tokens if before.id_of(token.text) is None]
    ids = ", ".join(f"{token.text} is {token.index}" for token in new)
    return f"new tokens: {ids}; a row that the checkpoint lacks begins as the mean of the others" if new else ""
