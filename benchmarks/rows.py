"""The rows and the adapter that every compared tool is given."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from benchmarks.training_job import LORA_ALPHA, LORA_RANK
from custom_components.datasets.chat import chat_dataset
from custom_components.datasets.preference import preference_dataset
from custom_components.models.builders import lora_llama_from_config
from custom_components.models.llama import ATTENTION_MODULES
from custom_components.models.lora import adapter_modules
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.prompt_format import PromptFormat
from custom_components.weights.adapters import save_adapter

Row = dict[str, list[int]]
Pair = dict[str, Row]
# What makes an answer of a pair longer than any `max_seq_len` that is measured.
_NUM_JOINED_ANSWERS = 8


class ForwardSize(NamedTuple):
    """Tokens of one forward, without padding."""

    num_tokens: int
    num_supervised_tokens: int


def tokenized_rows(checkpoint_dir: Path, source: str, num_rows: int, max_seq_len: int) -> list[Row]:
    """Tokens and labels (not shifted) of the first rows of a source, in any format that `chat_dataset` reads."""
    tokenizer = Llama2ChatTransform(checkpoint_dir / "tokenizer.model", max_seq_len=max_seq_len)
    dataset = chat_dataset(tokenizer, source, max_rows=num_rows)
    return [dataset[index] for index in range(len(dataset))]


def write_pairs(checkpoint_dir: Path, source: str, num_pairs: int, path: Path) -> Path:
    """Write pairs of long answers, each of several of a source's answers: for their lengths, not to be read."""
    num_answers = num_pairs + 2 * _NUM_JOINED_ANSWERS
    rows = tokenized_rows(checkpoint_dir, source, num_answers, max_seq_len=512)
    tokenizer = Llama2ChatTransform(checkpoint_dir / "tokenizer.model")
    answers = [tokenizer.decode([label for label in row["labels"] if label >= 0]).strip() for row in rows]

    def joined(start: int) -> str:
        return " ".join(answers[start : start + _NUM_JOINED_ANSWERS])

    pairs = [
        {"prompt": f"Question {index}", "chosen": joined(index), "rejected": joined(index + _NUM_JOINED_ANSWERS)}
        for index in range(num_pairs)
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path


def tokenized_pairs(checkpoint_dir: Path, source: str, num_pairs: int, max_seq_len: int) -> list[Pair]:
    """Give the first pairs of a source as `{"chosen", "rejected"}`, each as :func:`tokenized_rows` gives a row."""
    tokenizer = Llama2ChatTransform(checkpoint_dir / "tokenizer.model", max_seq_len=max_seq_len)
    dataset = preference_dataset(tokenizer, source, max_rows=num_pairs)
    return [dataset[index] for index in range(len(dataset))]


def num_supervised_tokens(row: Row) -> int:
    """The first token is never predicted."""
    return sum(label >= 0 for label in row["labels"][1:])


def forward_sizes(
    rows: Sequence[Row | Pair], batch_size: int, gradient_accumulation_steps: int
) -> list[list[ForwardSize]]:
    """The sizes of the forwards of every whole optimizer step."""
    rows_per_step = batch_size * gradient_accumulation_steps
    steps = [rows[start : start + rows_per_step] for start in range(0, len(rows) - rows_per_step + 1, rows_per_step)]
    return [
        [_forward_size(step[start : start + batch_size]) for start in range(0, rows_per_step, batch_size)]
        for step in steps
    ]


def _forward_size(rows: Sequence[Row | Pair]) -> ForwardSize:
    rows = [part for row in rows for part in (row.values() if "chosen" in row else (row,))]
    return ForwardSize(sum(len(row["tokens"]) for row in rows), sum(num_supervised_tokens(row) for row in rows))


def write_adapter(checkpoint_dir: Path, adapter_dir: Path, b_std: float = 0.0) -> Path:
    """Write a random adapter on all linear layers, in PEFT's format.

    Args:
        b_std: standard deviation of B; 0: B is zero, as at the start of training.

    Returns:
        The same adapter in torchtune's parameter names, a safetensors file beside the directory.
    """
    with torch.device("meta"):
        model = lora_llama_from_config(
            checkpoint_dir, ATTENTION_MODULES, apply_lora_to_mlp=True, lora_rank=LORA_RANK, lora_alpha=LORA_ALPHA
        )
    torch.manual_seed(0)
    parameters: dict[str, torch.Tensor] = {}
    for name, module in adapter_modules(model).items():
        module.lora_a.to_empty(device="cpu")
        module.lora_b.to_empty(device="cpu")
        module.initialize_parameters()
        with torch.no_grad():
            module.lora_b.weight.normal_(0, b_std)
        parameters |= {f"{name}.lora_a.weight": module.lora_a.weight, f"{name}.lora_b.weight": module.lora_b.weight}
    save_adapter(model, adapter_dir, str(checkpoint_dir), PromptFormat("llama2", None, ["</s>"]).texts())
    torchtune_path = adapter_dir.with_suffix(".safetensors")
    save_file({name: parameter.detach() for name, parameter in parameters.items()}, torchtune_path)
    return torchtune_path
