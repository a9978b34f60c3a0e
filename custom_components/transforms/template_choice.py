"""The prompt template of a tokenizer: by its name, with the tokenizer's own control tokens."""

from collections.abc import Mapping

from custom_components.runtime.errors import UserError
from custom_components.transforms.added_tokens import stated_ids
from custom_components.transforms.marked_template import MarkedTemplate
from custom_components.transforms.templates import PromptTemplate, prompt_template
from custom_components.transforms.tokenizer import Tokenizer
from custom_components.transforms.turns import BOS, EOS


def chosen_template(
    description: str | dict[str, str], tokenizer: Tokenizer
) -> tuple[str | dict[str, str], PromptTemplate]:
    """Look up a template for a tokenizer.

    Args:
        description: a name, of which "mistral" is that of the tokenizer's version; or parts, see
            :func:`prompt_template`.

    Returns:
        the name of the template that was chosen, or the parts, and the template.

    Raises:
        UserError: there is no such template, or the tokenizer does not have its control tokens.
    """
    if description == "mistral":
        description = "mistral_v3" if "[INST]" in tokenizer.control_ids else "mistral_v1"
    return description, with_tokens_of(prompt_template(description), description, tokenizer)


def with_tokens_of(
    template: PromptTemplate, description: str | Mapping[str, str], tokenizer: Tokenizer
) -> PromptTemplate:
    """Make a template that names a tokenizer's control tokens.

    Raises:
        UserError: the tokenizer does not have all of those that the template needs.
    """
    if not isinstance(template, MarkedTemplate):
        return template
    if lacking := [name for name in template.control_tokens if name not in tokenizer.control_ids]:
        raise UserError(
            f"prompt_template: {description!r} needs {' and '.join(lacking)}, which {str(tokenizer.path)!r} does not "
            "have; choose another, or write its parts yourself, in which such names are text"
        )
    return template.with_names(tokenizer.bos_piece, tokenizer.eos_piece, tuple(tokenizer.control_ids))


def stop_tokens(template: PromptTemplate, tokenizer: Tokenizer) -> tuple[int, ...]:
    """List the tokens that end an answer: those of the template, and EOS."""
    if not isinstance(template, MarkedTemplate):
        return (tokenizer.eos_id,)
    ids = {**tokenizer.control_ids, str(EOS): tokenizer.eos_id}
    if tokenizer.bos_id is not None:
        ids[str(BOS)] = tokenizer.bos_id
    ends = [ids[name] for name in template.end_tokens if name in ids]
    if not template.names_ends:
        return tuple(dict.fromkeys((tokenizer.eos_id, *ends)))
    stated = [token for token in stated_ids(tokenizer.path.parent, "eos_token_id") if tokenizer.piece(token)]
    return tuple(dict.fromkeys((*ends, tokenizer.eos_id, *stated)))
