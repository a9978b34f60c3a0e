"""Tokenizers as they go out with a model, and small ones of other kinds than Llama 2's."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from custom_components.transforms.added_tokens import AddedTokens
from custom_components.transforms.sentencepiece_tokenizer import SentencePieceTokenizer
from custom_components.transforms.tokenizer_files import ExportedTokenizer
from custom_components.transforms.tokenizer_json import fast_tokenizer
from tests.support.paths import TINY_TOKENIZER


def exported_tokenizer(model: Path, chat_template: str | None = None) -> ExportedTokenizer:
    """A SentencePiece model and nothing else; an answer ends with its EOS."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return ExportedTokenizer(
        SentencePieceTokenizer(model, processor, AddedTokens()), (processor.eos_id(),), chat_template
    )


def control_pieces_of(model: Path) -> dict[str, str]:
    """The texts of a SentencePiece model's control tokens, by transformers' names for them."""
    return exported_tokenizer(model).tokenizer.named_pieces


LLAMA3_TOKENS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
)
SMOLLM2_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# meta-llama/Meta-Llama-3-8B, tokenizer.json; meta-llama/llama3 @0053e6b, llama/tokenizer.py, pat_str.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_LINES = ["the answer to a question is what someone asks for", "assistant user system: one two 1234 don't Où 漢字 🙂"]


def write_byte_level_tokenizer(directory: Path, control_tokens: Sequence[str] = LLAMA3_TOKENS) -> Path:
    """Write a small tokenizer.json and its tokenizer_config.json as Llama 3's or SmolLM2's are; returns the directory.

    Args:
        control_tokens: `SMOLLM2_TOKENS` have ids from 0, as they have there, others follow the vocabulary.
    """
    are_first = control_tokens == SMOLLM2_TOKENS
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=not are_first))
    if are_first:
        words: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    else:
        words = [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=1,
        special_tokens=list(control_tokens) if are_first else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["\n\n".join(_LINES)], trainer)
    if not are_first:
        tokenizer.add_special_tokens(
            [tokenizers.AddedToken(token, normalized=False, special=True) for token in control_tokens]
        )
        bos = control_tokens[0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    bos, eos = ("<|im_start|>", "<|im_end|>") if are_first else ("<|begin_of_text|>", "<|end_of_text|>")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def write_byte_fallback_tokenizer(directory: Path, puts_space: str = "always") -> Path:
    """Write the tiny Llama's tokenizer.model as a tokenizer.json with two tokens more; returns the directory.

    Args:
        puts_space: before the first word of texts: "always": of all, as Llama 2's; "first": not of those that follow a
            control token, as transformers 5 writes it; "never".
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(TINY_TOKENIZER))
    tokenizer = fast_tokenizer(processor)
    assert tokenizer is not None
    if puts_space != "always":
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", puts_space, split=False)
    if puts_space == "never":
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(text, normalized=False) for text in ("<|im_start|>", "<|im_end|>")]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<unk>"}))
    return directory


def write_tiktoken_file(path: Path) -> Path:
    """Write a small tokenizer.model as Meta's of Llama 3: the vocabulary of `write_byte_level_tokenizer`, by ranks."""
    vocabulary = json.loads((write_byte_level_tokenizer(path.parent) / "tokenizer.json").read_text())["model"]["vocab"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path.parent / name).unlink()
    # Letters of Latin-1 stand for their own byte, the others in their order for the bytes that are left.
    themselves = {ord(letter) for letter in pre_tokenizers.ByteLevel.alphabet() if ord(letter) < 256}
    left = sorted(set(range(256)) - themselves)
    lines = []
    for text, rank in sorted(vocabulary.items(), key=lambda item: item[1]):
        as_bytes = bytes(ord(letter) if ord(letter) < 256 else left[ord(letter) - 256] for letter in text)
        lines.append(b"%s %d\n" % (base64.b64encode(as_bytes), rank))
    path.write_bytes(b"".join(lines))
    return path


def write_sentencepiece_model(path: Path, control_tokens: Sequence[str]) -> Path:
    """Train a small tokenizer.model with more control tokens than BOS and EOS, as Mistral's of v0.3."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_LINES * 3),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=list(control_tokens),
        minloglevel=2,
    )
    return path
