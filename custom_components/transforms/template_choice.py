"""The prompt template of a checkpoint: its own, or one that was chosen."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from custom_components.runtime.errors import UserError
from custom_components.transforms.added_tokens import stated_ids
from custom_components.transforms.jinja_dialogs import JinjaTemplate
from custom_components.transforms.marked_template import MarkedTemplate
from custom_components.transforms.own_template import OwnTemplate, own_template, with_tokens_of
from custom_components.transforms.templates import TEMPLATES, PromptTemplate, prompt_template
from custom_components.transforms.tokenizer import Tokenizer
from custom_components.transforms.turns import BOS, EOS


@dataclass(frozen=True)
class TemplateChoice:
    """A template for a tokenizer.

    Attributes:
        description: its name, or its parts.
        system_prompt: that of dialogs that have none, where the checkpoint's own template has one; None: it has none.
        note: how it relates to the checkpoint's own; "": there is nothing to say.
    """

    description: str | dict[str, str]
    template: PromptTemplate
    system_prompt: str | None = None
    note: str = ""


def chosen_template(description: str | dict[str, str], tokenizer: Tokenizer) -> TemplateChoice:
    """Look up a template for a tokenizer.

    Args:
        description: a name or parts, see :func:`prompt_template`. "mistral" is that of the tokenizer's version,
            "checkpoint" the Jinja template that the checkpoint comes with, "auto" the same if it is one of those built
            in, else Llama 2's.

    Raises:
        UserError: there is no such template, or the tokenizer does not have its control tokens; or the checkpoint's own
            cannot be used.
    """
    own = own_template(tokenizer)
    if description in ("auto", "checkpoint") and own is not None and own.name is not None:
        template = _bound(prompt_template(own.name), own.name, tokenizer)
        note = f"prompt_template: {own.name}, the checkpoint's own chat format"
        return TemplateChoice(own.name, template, own.system_prompt, note)
    if description == "checkpoint":
        return _from_jinja(own, tokenizer)
    if description == "auto":
        why = "has no chat template" if own is None else "has a chat template that is none of those built in"
        use = _format_of_tokens(tokenizer) if own is None else "; prompt_template=checkpoint trains with that one"
        return TemplateChoice(
            "llama2", TEMPLATES["llama2"], note=f"prompt_template: llama2, for the checkpoint {why}{use}"
        )
    if description == "mistral":
        description = "mistral_v3" if "[INST]" in tokenizer.control_ids else "mistral_v1"
    template = _bound(prompt_template(description), description, tokenizer)
    return TemplateChoice(description, template, note=_difference(description, own))


def _format_of_tokens(tokenizer: Tokenizer) -> str:
    """Say which format a tokenizer has the tokens of; Meta's layout has no chat template for it."""
    if with_tokens_of(TEMPLATES["llama3"], tokenizer) is None:
        return ""
    return "; its tokenizer has the tokens of prompt_template=llama3"


def names_in(template: PromptTemplate) -> tuple[str, ...]:
    """List the control tokens that a template's own text names; of a Jinja template they are not known."""
    return template.control_tokens if isinstance(template, MarkedTemplate) else ()


def stop_tokens(template: PromptTemplate, tokenizer: Tokenizer) -> tuple[int, ...]:
    """List the tokens that end an answer: those of the template, and EOS."""
    if not isinstance(template, MarkedTemplate | JinjaTemplate):
        return (tokenizer.eos_id,)
    ids = {**tokenizer.control_ids, str(EOS): tokenizer.eos_id}
    if tokenizer.bos_id is not None:
        ids[str(BOS)] = tokenizer.bos_id
    ends = [ids[name] for name in template.end_tokens if name in ids]
    if isinstance(template, MarkedTemplate) and not template.names_ends:
        return tuple(dict.fromkeys((tokenizer.eos_id, *ends)))
    stated = [token for token in stated_ids(tokenizer.path.parent, "eos_token_id") if tokenizer.piece(token)]
    return tuple(dict.fromkeys((*ends, tokenizer.eos_id, *stated)))


def _bound(template: PromptTemplate, description: Any, tokenizer: Tokenizer) -> PromptTemplate:
    """Make a template that names a tokenizer's control tokens.

    Raises:
        UserError: the tokenizer does not have all of those that the template needs.
    """
    bound = with_tokens_of(template, tokenizer)
    if bound is None:
        assert isinstance(template, MarkedTemplate)
        lacking = [name for name in template.control_tokens if name not in tokenizer.control_ids]
        raise UserError(
            f"prompt_template: {description!r} needs {' and '.join(lacking)}, which {str(tokenizer.path)!r} does not "
            "have; choose another, or write its parts yourself, in which such names are text"
        )
    if isinstance(bound, JinjaTemplate):
        try:
            bound.check()
        except ValueError as error:
            raise UserError(f"prompt_template: the chat template cannot be trained with: {error}") from None
    return bound


def _from_jinja(own: OwnTemplate | None, tokenizer: Tokenizer) -> TemplateChoice:
    if own is None:
        raise UserError(f"prompt_template: checkpoint: there is no chat template in {str(tokenizer.path.parent)!r}")
    description = {"jinja": own.source}
    template = _bound(JinjaTemplate(own.source), description, tokenizer)
    return TemplateChoice(description, template, note="prompt_template: the checkpoint's own chat template")


def _difference(description: str | Mapping[str, str], own: OwnTemplate | None) -> str:
    """Say that a format is not the checkpoint's own, if it has one."""
    if own is None or description == own.name or description == {"jinja": own.source}:
        return ""
    name = description if isinstance(description, str) else "one of its own"
    is_other = f"is {own.name}" if own.name else "is another, a chat template that is none of those built in"
    return f"prompt_template: {name}; the checkpoint's own chat format {is_other}"
