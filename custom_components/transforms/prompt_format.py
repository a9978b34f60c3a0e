"""The tokenizer and prompt format that an adapter or a merge was trained with, for asking it questions."""

import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from custom_components.runtime.errors import UserError
from custom_components.runtime.plain_yaml import MOST_YAML_BYTES, read_yaml
from custom_components.runtime.terminal import say
from custom_components.runtime.text_files import read_text
from custom_components.runtime.validation import value_problems
from custom_components.transforms.added_tokens import stated_ids
from custom_components.transforms.chat_transform import ChatTransform

PROMPT_FORMAT_NAME = "prompt_format.yaml"


@dataclass(frozen=True)
class PromptFormat:
    """The format of the prompts an adapter was trained on, and the tokens that end an answer."""

    prompt_template: str | dict[str, str]
    system_prompt: str | None
    stop_tokens: list[str]

    def texts(self) -> dict[str, str]:
        """Give the file that states it, beside an adapter's or a merge's weights: its content by its name."""
        return {PROMPT_FORMAT_NAME: yaml.safe_dump(vars(self), sort_keys=False, allow_unicode=True)}


class _Keys(BaseModel):
    """prompt_format.yaml."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt_template: str | dict[str, str]
    system_prompt: str | None
    stop_tokens: list[str]


def read_prompt_format(directory: Path) -> PromptFormat | None:
    """Read the prompt format of an adapter or a merge; None if it has none, as those of other tools.

    Raises:
        UserError: the file is not a prompt format.
    """
    path = directory / PROMPT_FORMAT_NAME
    if not path.exists():
        return None
    try:
        values = read_yaml(read_text(path, MOST_YAML_BYTES))
        return PromptFormat(**dict(_Keys.model_validate(values)))
    except ValidationError as error:
        problems = value_problems(error, values, lambda place: "")
        place, message = next(iter(problems.items()))
        raise UserError(f"{path}: not a prompt format ({place.removeprefix('.') or 'it'}: {message})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a prompt format ({error})") from None


def stated_prompt_format(checkpoint_dir: Path, adapter_dir: Path | None) -> PromptFormat | None:
    """Read the prompt format of an adapter, or else of the merge it is on."""
    of_adapter = read_prompt_format(adapter_dir) if adapter_dir else None
    return of_adapter or read_prompt_format(checkpoint_dir)


def tokenizer_with_format(
    checkpoint_dir: Path,
    trained: PromptFormat | None,
    adapter_dir: Path | None = None,
    *,
    prompt_template: str | dict[str, str] | None = None,
    system_prompt: str | None = None,
) -> ChatTransform:
    """Load the checkpoint's tokenizer with the prompt format and stop tokens that training used.

    Args:
        trained: None: none is stated; use the checkpoint's own, or Llama 2's, also with the stop tokens its configs
            state.
        adapter_dir: may have tokens of its own, in the tokenizer's files beside it.
        prompt_template, system_prompt: override the prompt format; a warning says so if training used another.

    Raises:
        UserError: there is no tokenizer, the template is unknown, or the tokenizer does not have the stop tokens.
    """
    of_training = trained or PromptFormat("auto", None, [])
    template = of_training.prompt_template if prompt_template is None else prompt_template
    system = of_training.system_prompt if system_prompt is None else system_prompt
    try:
        tokenizer = ChatTransform(checkpoint_dir, None, system, template, adapter_dir=adapter_dir)
    except UserError as error:  # the recipes that ask here have no key of that name
        raise UserError(
            *(message.replace("tokenizer.path:", "checkpoint_dir:") for message in error.messages)
        ) from None
    if trained is None:
        stated = stated_ids(checkpoint_dir, "eos_token_id")
        stop_tokens = [token for token in stated if tokenizer.tokenizer.piece(token) is not None]
        return tokenizer.replace(stop_tokens=tuple(dict.fromkeys((*stop_tokens, *tokenizer.stop_tokens))))
    # By what was chosen: "mistral" is the template of the tokenizer's version.
    told = {"prompt_template": (prompt_template, tokenizer.prompt_template), "system_prompt": (system_prompt, system)}
    for name, (value, found) in told.items():
        if value is not None and found != getattr(trained, name):
            say(f"warning: {name} is {value!r}, it was trained with {getattr(trained, name)!r}", sys.stderr)
    return tokenizer.replace(stop_tokens=tuple(tokenizer.ids_of_pieces(trained.stop_tokens)), format_note="")


def write_prompt_format(prompt_format: PromptFormat, directory: Path) -> None:
    for name, text in prompt_format.texts().items():
        (directory / name).write_text(text, encoding="utf-8")
