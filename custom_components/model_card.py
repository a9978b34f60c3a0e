"""Model cards: the README.md of an adapter and of a merged model, for people and for the hub.

Only what is known is said. Local files and directories are named by their last component: a card is made to be
published, and where something lay on the machine that trained it is nobody's business.

Front matter: huggingface.co/docs/hub/model-cards. `base_model` and `datasets` take names on the hub only.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from custom_components.adapters import CARD_NAME, base_model_name
from custom_components.builders import HUGGING_FACE_SPELLINGS
from custom_components.data_sources import data_files
from custom_components.errors import UserError
from custom_components.metrics import read_metrics
from custom_components.model_card_loading import HOW_TO_LOAD_MERGED, how_to_load_adapter
from custom_components.prompts import chat_messages, dialog_turns, prompt_template
from custom_components.settings import TrainingSettings
from custom_components.tokenized_rows import ChatDataset
from custom_components.training_state import Progress

_TAG = "llama-lora-recipes"
_FIRST_SECTION = "\n## Data\n\n"
_LAST_SECTION = "\n## How to load it\n"


def adapter_card(
    settings: TrainingSettings,
    dataset: ChatDataset,
    dataset_val: ChatDataset | None,
    system_prompt: str | None,
    progress: Progress,
    metrics: Path,
) -> str:
    """The card of a finished run's adapter, as Markdown with front matter.

    Args:
        dataset, dataset_val: the rows trained on, and validated on.
        system_prompt: of dialogs that had none of their own.
        metrics: the run's metrics.jsonl.
    """
    base = _hub_name(settings.checkpoint_dir)
    front_matter = _front_matter(
        settings.checkpoint_dir,
        relation="adapter",
        library_name="peft",
        tags=["lora", *(["qlora"] if settings.quantize_base else []), _TAG],
        datasets=[summary.source for summary in dataset.summaries if _is_on_hub(summary.source)],
    )
    kind = "QLoRA" if settings.quantize_base else "LoRA"
    return "".join(
        [
            front_matter,
            f"\n# {kind} adapter for {_link(base) or _local(settings.checkpoint_dir)}\n",
            f"\nTrained with `llama-lora-recipes`. {_which_step(progress)}\n",
            _FIRST_SECTION,
            *(f"- {line}\n" for line in _data_lines(settings, dataset, dataset_val)),
            "\n## Prompt format\n",
            _prompt_format(settings.prompt_template, system_prompt),
            "\n## Training\n\n",
            *(f"- {name}: {_plain(value)}\n" for name, value in _hyperparameters(settings, progress).items()),
            "\n## Losses\n\nIn nats per supervised token.\n\n",
            *(f"- {line}\n" for line in _loss_lines(progress, metrics)),
            _LAST_SECTION,
            how_to_load_adapter(settings, base or f"path/to/{_name(settings.checkpoint_dir)}"),
        ]
    )


def merged_card(
    checkpoint_dir: Path, adapters: Sequence[tuple[Path, float]], merged_onto: Literal["original", "dequantized"]
) -> str:
    """The card of a base model that adapters were merged into, as Markdown with front matter.

    What a run's card says of data, prompt format and training is taken over; of an adapter without such a card nothing
    is said.

    Args:
        adapters: directories, each with its weight.
        merged_onto: the base's weights as they are in the checkpoint, or as NF4 holds them.
    """
    base = _hub_name(checkpoint_dir)
    cards = [_own_card(adapter_dir) for adapter_dir, _ in adapters]
    front_matter = _front_matter(
        checkpoint_dir,
        # The hub's "merge" is for models merged from several bases.
        relation="finetune",
        library_name="transformers",
        tags=[_TAG],
        datasets=[name for card, _ in cards for name in (card.get("datasets") or [])],
    )
    parts = [
        front_matter,
        f"\n# {_link(base) or _local(checkpoint_dir)} with "
        f"{'a LoRA adapter' if len(adapters) == 1 else f'{len(adapters)} LoRA adapters'} merged in\n",
        f"\nMerged with `llama-lora-recipes` into the base's {merged_onto} weights.\n",
    ]
    for (adapter_dir, weight), (_, facts) in zip(adapters, cards, strict=True):
        if len(adapters) > 1 or weight != 1:
            parts.append(f"\n**Adapter {_local(adapter_dir)}, weight {weight:g}**\n")
        if facts:
            parts.append(f"{_FIRST_SECTION}{facts}\n")
    return "".join([*parts, _LAST_SECTION, HOW_TO_LOAD_MERGED])


def _front_matter(
    checkpoint_dir: Path, *, relation: str, library_name: str, tags: list[str], datasets: list[str]
) -> str:
    base = _hub_name(checkpoint_dir)
    data = ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        datasets=list(dict.fromkeys(datasets)) or None,
        library_name=library_name,
        pipeline_tag="text-generation",
        tags=tags,
        **_licence(checkpoint_dir),
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _licence(checkpoint_dir: Path) -> dict[str, Any]:
    """The licence that the base's own card states, if it has a card."""
    stated = _card_metadata(checkpoint_dir / CARD_NAME)
    licence = {key: stated[key] for key in ("license", "license_name") if isinstance(stated.get(key), str)}
    # A link to a file beside the base's card leads nowhere from here.
    if str(stated.get("license_link", "")).startswith("https://"):
        licence["license_link"] = stated["license_link"]
    return licence if "license" in licence else {}


def _card_metadata(path: Path) -> dict[str, Any]:
    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _own_card(adapter_dir: Path) -> tuple[dict[str, Any], str]:
    """Front matter and sections, from data to losses, of a card that :func:`adapter_card` made; else empty."""
    metadata = _card_metadata(adapter_dir / CARD_NAME)
    tags = metadata.get("tags")
    if not isinstance(tags, list) or _TAG not in tags:
        return {}, ""
    text = (adapter_dir / CARD_NAME).read_text(encoding="utf-8")
    return metadata, text.partition(_FIRST_SECTION)[2].rpartition(_LAST_SECTION)[0].rstrip("\n")


def _hub_name(checkpoint_dir: Path) -> str | None:
    name = base_model_name(checkpoint_dir)
    return None if name == str(checkpoint_dir) else name


def _is_on_hub(source: str) -> bool:
    try:
        return not data_files(source)
    except UserError:  # a file that has gone since it was read
        return False


def _local(path: Path | str) -> str:
    return f"`{_name(path)}`"


def _name(path: Path | str) -> str:
    return Path(path).absolute().name  # note: Path(".") has no name


def _link(hub_name: str | None, kind: str = "") -> str | None:
    return f"[{hub_name}](https://huggingface.co/{kind}{hub_name})" if hub_name else None


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _which_step(progress: Progress) -> str:
    if progress.best_step is not None:
        return f"It is the state after step {progress.best_step} of {progress.num_steps}, the best by validation loss."
    return f"It is the state after the last of {progress.num_steps} steps."


def _data_lines(settings: TrainingSettings, dataset: ChatDataset, dataset_val: ChatDataset | None) -> Iterator[str]:
    source = settings.dataset.get("source")
    weights = {part["source"]: part.get("weight", 1) for part in source} if isinstance(source, list) else {}
    for summary in dataset.summaries:
        name = _link(summary.source, "datasets/") if _is_on_hub(summary.source) else _local(summary.source)
        weight = f", weight {weights[summary.source]:g}" if summary.source in weights else ""
        dropped = f" of {summary.num_rows}" if summary.num_kept < summary.num_rows else ""
        truncated = f", {summary.num_truncated} of them cut to the longest length" if summary.num_truncated else ""
        yield f"{name}{weight}: {summary.num_kept}{dropped} rows{truncated}"
    yield f"rows trained on: {len(dataset)}"
    if dataset_val is not None:
        yield f"rows validated on: {len(dataset_val)}"
    yield {
        "assistant": "supervised: the answers",
        "last_assistant": "supervised: the last answer of each dialog",
        "all": "supervised: prompts and answers",
    }[settings.train_on]


def _prompt_format(template: str | dict[str, str], system_prompt: str | None) -> str:
    """A dialog of placeholders as it is tokenized; `<s>` and `</s>` stand for BOS and EOS."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
    exchange = [{"role": "user", "content": "{question}"}, {"role": "assistant", "content": "{answer}"}]
    turns = dialog_turns(chat_messages([*system, *exchange, *exchange]), prompt_template(template))
    text = "".join(f"<s>{turn.prompt}{turn.answer}</s>" for turn in turns)
    name = f"`{template}`" if isinstance(template, str) else "One of its own"
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return (
        f"\n{name}. A dialog of two questions; `<s>` and `</s>` are the tokenizer's control tokens, and `</s>` ends an "
        f"answer:\n\n{fence}text\n{text}\n{fence}\n"
    )


def _hyperparameters(settings: TrainingSettings, progress: Progress) -> Mapping[str, object]:
    """By their names in the config, those that did something."""
    peft_names = {tune: peft for peft, tune in HUGGING_FACE_SPELLINGS.items()}
    modules = [peft_names.get(name, name) for name in settings.lora_attn_modules]
    modules += ["gate_proj", "up_proj", "down_proj"] if settings.apply_lora_to_mlp else []
    modules += ["lm_head"] if settings.apply_lora_to_output else []
    chosen = {
        "adapted modules": modules,
        "lora_rank": settings.lora_rank,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "use_rslora": settings.use_rslora or None,
        "use_dora": settings.use_dora or None,
        "base while training": "4-bit NF4 with double quantization" if settings.quantize_base else None,
        "optimizer steps": progress.num_steps,
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "packed": settings.packed or None,
        "max_seq_len": settings.max_seq_len,
        "optimizer": settings.optimizer["_component_"].rpartition(".")[2],
        **{f"optimizer.{key}": value for key, value in settings.optimizer.items() if key in _OPTIMIZER_KEYS},
        "lr_scheduler": settings.lr_scheduler["_component_"].rpartition(".")[2],
        "warmup_steps": settings.warmup_steps,
        "warmup_ratio": settings.warmup_ratio or None,
        "lora_plus_ratio": settings.lora_plus_ratio,
        "neftune_noise_alpha": settings.neftune_noise_alpha,
        "clip_grad_norm": settings.clip_grad_norm,
        "seed": settings.seed,
    }
    return {name: value for name, value in chosen.items() if value is not None}


_OPTIMIZER_KEYS = ("lr", "weight_decay", "betas", "eps")


def _loss_lines(progress: Progress, metrics: Path) -> Iterator[str]:
    steps = [record for record in read_metrics(metrics) if record.get("loss") is not None]
    num_tokens = sum(record["supervised_tokens"] for record in steps)
    mean = sum(record["loss"] * record["supervised_tokens"] for record in steps) / num_tokens
    yield f"training, last step: {steps[-1]['loss']:.4f}"
    yield f"training, mean over the tokens of all steps: {mean:.4f}"
    if progress.best_step is not None:
        yield f"validation, best, after step {progress.best_step}: {progress.best_val_loss:.4f}"
