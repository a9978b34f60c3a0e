"""The tokenizer and prompt format that an adapter was trained with, for everything that asks it questions."""

import sys
from pathlib import Path
from typing import Any

from custom_components.adapters import read_prompt_format
from custom_components.transforms import Llama2ChatTransform


def tokenizer_of_adapter(
    checkpoint_dir: Path,
    adapter_dir: Path | None,
    *,
    prompt_template: str | dict[str, str] | None = None,
    system_prompt: str | None = None,
) -> Llama2ChatTransform:
    """The checkpoint's tokenizer with the prompt format and stop tokens of an adapter.

    Args:
        adapter_dir: None, or an adapter that states no prompt format: Llama 2's.
        prompt_template, system_prompt: say otherwise; where the adapter was trained with another, a warning says so.

    Raises:
        UserError: no tokenizer there, an unknown template, a damaged prompt format, or stop tokens that the tokenizer
            does not have.
    """
    trained = read_prompt_format(adapter_dir) if adapter_dir else None
    chosen: dict[str, Any] = {}
    for name, told, default in (("prompt_template", prompt_template, "llama2"), ("system_prompt", system_prompt, None)):
        trained_value = getattr(trained, name) if trained else default
        if trained and told is not None and told != trained_value:
            print(f"warning: {name} is {told!r}, the adapter was trained with {trained_value!r}", file=sys.stderr)
        chosen[name] = trained_value if told is None else told
    tokenizer = Llama2ChatTransform(checkpoint_dir / "tokenizer.model", **chosen)
    if trained is not None:
        tokenizer.stop_tokens = tokenizer.ids_of_pieces(trained.stop_tokens)
    return tokenizer
