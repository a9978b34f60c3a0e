"""What the run that an adapter came from tells about it: its config.yaml, which lies beside adapter/."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from custom_components import datasets
from custom_components.config.task_settings import EvaluationSettings
from custom_components.datasets.chat import chat_dataset
from custom_components.datasets.sources import data_files
from custom_components.runs.run_directory import RUN_CONFIG_NAME
from custom_components.runtime.errors import UserError
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.prompt_format import read_prompt_format

_CHAT_DATASET = f"{datasets.__name__}.{chat_dataset.__name__}"
# Rows are a few and cut short, so that a proof on a model of 7B takes minutes on a CPU.
_NUM_ROWS = 4
_NUM_TOKENS_PER_ROW = 64
_SENTENCES = (
    "Why is the sky blue?",
    "Write a short letter to a friend who has moved to the sea.",
    "Was ist der Unterschied zwischen einem See und einem Meer?",
    "List three prime numbers between 20 and 40, and add them up.",
)


def trained_on_nf4(adapter_dir: Path) -> bool:
    """Whether the run says that the base was quantized."""
    return _run_config(adapter_dir).get("quantize_base") is True


def example_rows(adapter_dir: Path, tokenizer: Llama2ChatTransform) -> tuple[list[list[int]], str]:
    """The first tokens of a few rows to compare models on, and in words what they are.

    They are rows that the adapter was trained on, where its run names local files that are still there; otherwise
    sentences of our own in its prompt format. Nothing is fetched, and of the config nothing is called.
    """
    rows = _training_rows(_run_config(adapter_dir).get("dataset"), tokenizer)
    if rows:
        return rows, "training rows"
    dialogs = [[{"role": "user", "content": sentence}] for sentence in _SENTENCES]
    rows = [tokenizer({"messages": dialog}, inference=True)["tokens"][:_NUM_TOKENS_PER_ROW] for dialog in dialogs]
    return rows, "sentences of our own, for the training rows are not there"


def tokenizer_of_run(
    adapter_dir: Path, tokenizer: Llama2ChatTransform, settings: EvaluationSettings
) -> Llama2ChatTransform:
    """Make a tokenizer that cuts and supervises rows as the adapter's run did: `split_validation` draws by both.

    Where no run is known it is the one given.

    Raises:
        UserError: the settings say otherwise than the run.
    """
    config = _run_config(adapter_dir)
    if "val_fraction" not in config:
        return tokenizer
    keys = ("val_fraction", "seed", "on_overlong", "max_seq_len")
    run = {key: config[key] for key in keys if key in config}
    if (trained := read_prompt_format(adapter_dir)) is not None:
        run |= {"prompt_template": trained.prompt_template, "system_prompt": trained.system_prompt}
    for key, value in run.items():
        told = getattr(settings, key)
        if told is not None and told != value:
            raise UserError(
                f"{key}: {told!r} draws other rows than the run kept for validation, some that it trained on; "
                f"set {key}={'null' if value is None else value}"
            )
    return tokenizer.replace(
        max_seq_len=run.get("max_seq_len", settings.max_seq_len),
        train_on=config.get("train_on", tokenizer.train_on),
    )


def _training_rows(node: Any, tokenizer: Llama2ChatTransform) -> list[list[int]]:
    if not isinstance(node, dict) or node.get("_component_") != _CHAT_DATASET:
        return []
    try:
        if not all(data_files(source) for source in _sources(node)):
            return []
        keys = ("source", "format", "column_map", "system_prompt")
        settings = {key: node[key] for key in keys if node.get(key) is not None}
        dataset = chat_dataset(tokenizer, max_rows=_NUM_ROWS, on_bad_row="skip", **settings)
    except (UserError, KeyError, TypeError, AttributeError):
        return []  # another day's files: the proof goes on without them
    return [dataset[index]["tokens"][:_NUM_TOKENS_PER_ROW] for index in range(min(_NUM_ROWS, len(dataset)))]


def _sources(node: dict[str, Any]) -> Sequence[str]:
    source = node["source"]
    return [source] if isinstance(source, str) else [part["source"] for part in source]


def _run_config(adapter_dir: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load((adapter_dir.resolve().parent / RUN_CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}
