"""The run that an adapter came from, as the config.yaml beside its adapter/ states it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from custom_components import datasets
from custom_components.config.settings import QuantizationName
from custom_components.datasets.chat import chat_dataset
from custom_components.datasets.pair_rows import PreferenceDataset
from custom_components.datasets.preference import preference_dataset
from custom_components.datasets.source_files import is_on_hub
from custom_components.datasets.tokenized_rows import ChatDataset
from custom_components.runs.recognition import RUN_CONFIG_NAME
from custom_components.runtime.errors import UserError
from custom_components.runtime.plain_yaml import MOST_YAML_BYTES, read_yaml
from custom_components.runtime.text_files import read_text
from custom_components.transforms.chat_transform import ChatTransform
from custom_components.transforms.prompt_format import PromptFormat

_DATASETS: dict[str, Callable[..., ChatDataset | PreferenceDataset]] = {
    f"{datasets.__name__}.{made_by.__name__}": made_by for made_by in (chat_dataset, preference_dataset)
}
_PAIRS = f"{datasets.__name__}.{preference_dataset.__name__}"
# Rows are a few and cut short, so that a proof on a model of 7B takes minutes on a CPU.
_NUM_ROWS = 4
_NUM_TOKENS_PER_ROW = 64
_SENTENCES = (
    "Why is the sky blue?",
    "Write a short letter to a friend who has moved to the sea.",
    "Was ist der Unterschied zwischen einem See und einem Meer?",
    "List three prime numbers between 20 and 40, and add them up.",
)


@dataclass(frozen=True)
class ValidationDraw:
    """The keys of a config that decide which rows :func:`split_validation` draws; None: left to the run."""

    val_fraction: float
    seed: int
    on_overlong: str
    on_uneven_turns: str
    on_empty_answer: str
    max_seq_len: int | None
    prompt_template: str | dict[str, str] | None
    system_prompt: str | None


@dataclass(frozen=True)
class Origin:
    """The run that an adapter came from.

    Attributes:
        config: of the run; empty if no run is known.
    """

    config: Mapping[str, Any]

    @property
    def quantization(self) -> str | None:
        """The format of the base that the run trained over; None: it was not quantized, or no run is known."""
        stated = self.config.get("quantization")
        if stated not in get_args(QuantizationName):
            return "nf4" if self.config.get("quantize_base") is True else None
        return None if stated == "none" else str(stated)

    @property
    def has_pairs(self) -> bool:
        """Whether the run learned from pairs of a better and a worse answer."""
        dataset = self.config.get("dataset")
        return isinstance(dataset, dict) and dataset.get("_component_") == _PAIRS

    def example_rows(self, tokenizer: ChatTransform) -> tuple[list[list[int]], str]:
        """Give the first tokens of a few rows to compare models on, and in words what they are.

        They are rows that the adapter was trained on, if its run names local files that still exist; otherwise
        sentences of our own in its prompt format. Nothing is fetched, and nothing that the config names is called.
        """
        rows = _training_rows(self.config.get("dataset"), tokenizer)
        if rows:
            return rows, "training rows"
        dialogs = [[{"role": "user", "content": sentence}] for sentence in _SENTENCES]
        rows = [tokenizer({"messages": dialog}, inference=True)["tokens"][:_NUM_TOKENS_PER_ROW] for dialog in dialogs]
        return rows, "sentences of our own, for the training rows are not there"

    def validation_tokenizer(
        self, tokenizer: ChatTransform, draw: ValidationDraw, trained: PromptFormat | None
    ) -> ChatTransform:
        """Make a tokenizer that cuts and supervises rows as the run did: :func:`split_validation` draws by both.

        If no run is known, it is the one given.

        Raises:
            UserError: the draw differs from the run's, or the run learned from pairs.
        """
        if "val_fraction" not in self.config:
            return tokenizer
        if self.has_pairs:
            raise UserError(
                f"val_fraction: {draw.val_fraction}: this adapter learned from pairs of answers, and dialogs are "
                "evaluated here; how its run rated the pairs that it kept is in the run's metrics.jsonl: val_loss, "
                "val_reward_margin, val_reward_accuracy. Name dialogs in dataset.source, and set val_fraction=null"
            )
        keys = ("val_fraction", "seed", "on_overlong", "on_uneven_turns", "on_empty_answer", "max_seq_len")
        run = {key: self.config[key] for key in keys if key in self.config}
        if trained is not None:
            run |= {"prompt_template": trained.prompt_template, "system_prompt": trained.system_prompt}
        for key, value in run.items():
            told = getattr(draw, key)
            if told is not None and told != value:
                raise UserError(
                    f"{key}: {told!r} draws other rows than the run kept for validation, some that it trained on; "
                    f"set {key}={'null' if value is None else value}"
                )
        return tokenizer.replace(
            max_seq_len=run.get("max_seq_len", draw.max_seq_len),
            train_on=self.config.get("train_on", tokenizer.train_on),
        )


def open_origin(result_dir: Path) -> Origin:
    """Read the config of the run whose adapter/ or model/ this is, if it is one."""
    try:
        config = read_yaml(read_text(result_dir.resolve().parent / RUN_CONFIG_NAME, MOST_YAML_BYTES))
    except (OSError, ValueError):
        return Origin({})
    return Origin(config if isinstance(config, dict) else {})


def _training_rows(node: Any, tokenizer: ChatTransform) -> list[list[int]]:
    if not isinstance(node, dict) or node.get("_component_") not in _DATASETS:
        return []
    try:
        if any(is_on_hub(source) for source in _sources(node)):
            return []
        keys = ("source", "split", "format", "column_map", "system_prompt")
        settings = {key: node[key] for key in keys if node.get(key) is not None}
        dataset = _DATASETS[node["_component_"]](tokenizer, max_rows=_NUM_ROWS, on_bad_row="skip", **settings)
    except (UserError, KeyError, TypeError, AttributeError):
        return []  # files that have changed since: the proof does without them
    rows: list[Any] = [dataset[index] for index in range(min(_NUM_ROWS, len(dataset)))]
    return [row.get("chosen", row)["tokens"][:_NUM_TOKENS_PER_ROW] for row in rows]


def _sources(node: dict[str, Any]) -> Sequence[str]:
    source = node["source"]
    parts = [source] if isinstance(source, str) else source
    return [part if isinstance(part, str) else part["source"] for part in parts]
