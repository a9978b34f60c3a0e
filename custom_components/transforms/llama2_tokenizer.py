"""The transform under torchtune's name and with its arguments, for torchtune's configs and recipes."""

from collections.abc import Mapping

from custom_components.transforms.llama2_chat import Llama2ChatTransform

# What torchtune's default, and its null, mean here.
_TEMPLATES = {"torchtune.models.llama2.Llama2ChatTemplate": "llama2", None: "none"}


def llama2_tokenizer(
    path: str,
    max_seq_len: int | None = None,
    prompt_template: str | dict[str, str] | None = "torchtune.models.llama2.Llama2ChatTemplate",
) -> Llama2ChatTransform:
    """Make a :class:`Llama2ChatTransform` with the arguments of `torchtune.models.llama2.llama2_tokenizer`.

    Args:
        path: the checkpoint's SentencePiece model, `tokenizer.model`.
        max_seq_len: rows are cut to this many tokens; None: never.
        prompt_template: torchtune's path of Llama 2's template, or one of ours; None: text without a template.

    Raises:
        UserError: there is no such file, it is not a SentencePiece model, or an unknown template.
    """
    if not isinstance(prompt_template, Mapping):
        prompt_template = _TEMPLATES.get(prompt_template, prompt_template)
    assert prompt_template is not None
    return Llama2ChatTransform(path, max_seq_len, prompt_template=prompt_template)
