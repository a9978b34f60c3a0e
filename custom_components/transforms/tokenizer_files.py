"""A model's tokenizer in the files that transformers, vLLM and llama.cpp's converter read."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from custom_components.runtime.terminal import say
from custom_components.transforms.added_tokens import NAMES, read_json, stated_ids
from custom_components.transforms.chat_transform import ChatTransform
from custom_components.transforms.jinja_template import chat_template
from custom_components.transforms.json_tokenizer import JsonTokenizer
from custom_components.transforms.prompt_format import PromptFormat
from custom_components.transforms.sentencepiece_tokenizer import SentencePieceTokenizer
from custom_components.transforms.tokenizer import Tokenizer
from custom_components.transforms.tokenizer_json import equals_but_for_additions, fast_tokenizer

# What `tokenizer_texts` may give.
TOKENIZER_NAMES = ("tokenizer.json", "added_tokens.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ExportedTokenizer:
    """A checkpoint's tokenizer, as it is written beside a model made from the checkpoint.

    Attributes:
        tokenizer: the checkpoint's pieces, and the tokens that are added to them.
        stop_tokens: the ids that end an answer.
        chat_template: Jinja, as tokenizer_config.json has it; None: none is written.
        begins_with_bos: prompts begin with BOS: where the chat template is not rendered, tools put it there.
    """

    tokenizer: Tokenizer
    stop_tokens: tuple[int, ...]
    chat_template: str | None
    begins_with_bos: bool = True

    @property
    def names(self) -> dict[str, str]:
        """The texts of tokens, by transformers' names for them.

        BOS and the unknown token are the SentencePiece model's, EOS is one of the stop tokens, preferably the one that
        the checkpoint calls so, and the others are the checkpoint's.
        """
        stated = self.tokenizer.added_tokens.names
        known = {name: text for name, text in stated.items() if self.tokenizer.id_of(text) is not None}
        stops = [self.tokenizer.piece(token) for token in self.stop_tokens]
        eos = known.get("eos_token")
        named = known | self.tokenizer.named_pieces
        named["eos_token"] = eos if eos is not None and eos in stops else str(stops[0])
        return {name: named[name] for name in NAMES if name in named}

    @property
    def pad_id(self) -> int | None:
        """The id for padding: the token named so, else that of the checkpoint's configs; None: there is none."""
        if "pad_token" in self.names:
            return self.tokenizer.id_of(self.names["pad_token"])
        stated = stated_ids(self.tokenizer.path.parent, "pad_token_id")
        return stated[0] if stated else None


def exported_tokenizer(transform: ChatTransform, chat_template: str | None) -> ExportedTokenizer:
    """Give the tokenizer of a transform as it is written beside a model, ending answers as the transform does."""
    stop_tokens = transform.stop_tokens or (transform.eos_id,)
    return ExportedTokenizer(transform.tokenizer, stop_tokens, chat_template, transform.begins_with_bos)


def template_of_format(transform: ChatTransform, prompt_format: PromptFormat) -> str:
    """Write the chat template of the prompts that a model was trained on."""
    added_tokens = list(dict.fromkeys([*transform.tokenizer.added_tokens.ids, *transform.template_tokens]))
    pieces = transform.tokenizer.named_pieces
    return chat_template(prompt_format.prompt_template, prompt_format.system_prompt, pieces, added_tokens)


def write_tokenizer(directory: Path, exported: ExportedTokenizer, max_seq_len: int) -> None:
    """Write the files of :func:`tokenizer_texts`, and the tokenizer.model, if there is one."""
    if isinstance(exported.tokenizer, SentencePieceTokenizer):
        shutil.copyfile(exported.tokenizer.path, directory / "tokenizer.model")
    for name, text in tokenizer_texts(exported, max_seq_len).items():
        (directory / name).write_bytes(text.encode())


def tokenizer_texts(exported: ExportedTokenizer, max_seq_len: int) -> dict[str, str]:
    """Give tokenizer.json and tokenizer_config.json, content by name.

    Where a tokenizer.model has added tokens, added_tokens.json is given too.

    Args:
        max_seq_len: the model's context, in tokens.
    """
    tokenizer = exported.tokenizer
    texts = {}
    if isinstance(tokenizer, JsonTokenizer):
        texts["tokenizer.json"] = tokenizer.file_text
        config = _config_beside_json(exported, max_seq_len)
    else:
        assert isinstance(tokenizer, SentencePieceTokenizer)
        config = _tokenizer_config(exported, max_seq_len)
        if tokenizer.added_tokens.tokens:
            texts["added_tokens.json"] = _json_text(tokenizer.added_tokens.ids)
        fast = _fast_tokenizer_text(tokenizer)
        if fast is not None:
            texts["tokenizer.json"] = fast
        # LlamaTokenizer takes only the vocabulary and the merges of a tokenizer.json.
        config = {"tokenizer_class": "LlamaTokenizer" if fast is None else "PreTrainedTokenizerFast"} | config
    if exported.chat_template is not None:
        config["chat_template"] = exported.chat_template
    return texts | {"tokenizer_config.json": _json_text(config)}


def _fast_tokenizer_text(tokenizer: SentencePieceTokenizer) -> str | None:
    """Give the tokenizer.json of a tokenizer.model: the checkpoint's own if it is the same; None: there is none."""
    beside = tokenizer.path.parent / "tokenizer.json"
    fast = fast_tokenizer(tokenizer.processor, tokenizer.added_tokens.tokens)
    if fast is None:
        say(
            "warning: no tokenizer.json is written, for this tokenizer.model is not a plain byte-pair encoding; what "
            "transformers makes of it may give other ids than training used"
        )
        return None
    return beside.read_bytes().decode() if equals_but_for_additions(beside, fast) else fast.to_str(pretty=True)


def _config_beside_json(exported: ExportedTokenizer, max_seq_len: int) -> dict[str, Any]:
    """Give the checkpoint's own tokenizer_config.json, with the tokens and the template that the model has now."""
    config = read_json(exported.tokenizer.path.parent / "tokenizer_config.json")
    config.pop("chat_template", None)
    # Classes for one model, GPT2Tokenizer for example, take only the vocabulary and the merges of a tokenizer.json.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return config | exported.names | {"model_max_length": max_seq_len}


def _tokenizer_config(exported: ExportedTokenizer, max_seq_len: int) -> dict[str, Any]:
    """Describe a tokenizer.model that is Llama 2's, or made like it, as transformers' tokenizer_config.json."""
    added = exported.tokenizer.added_tokens
    config: dict[str, Any] = {
        # Without it LlamaTokenizer of transformers 5 puts no space before the first word after a control token:
        # 29961 instead of 518.
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
        **exported.names,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
    }
    if added.tokens:
        config["added_tokens_decoder"] = {
            str(token.index): {
                "content": token.text,
                **{"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, **token.flags},
                "special": token.is_special,
            }
            for token in added.tokens
        }
    if other_special := [text for text in added.other_special if exported.tokenizer.id_of(text) is not None]:
        config["additional_special_tokens"] = other_special
    return config


def _json_text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
