"""Parts that the model cards of adapters and of merged models share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from custom_components.weights.card_metadata import CARD_NAME, card_metadata
from custom_components.weights.checkpoint_files import BaseCheckpoint

TAG = "llama-lora-recipes"
FIRST_SECTION = "\n## Data\n\n"
LAST_SECTION = "\n## How to load it\n"


# The key of a card's front matter that says how far an adapter's run was.
_PROGRESS_KEY = "training_progress"


@dataclass(frozen=True)
class TrainedSteps:
    """How far the run of an adapter was when it was saved.

    Attributes:
        num_planned_steps: that the run has if nothing stops it.
        is_finished: it was not asked to stop before its end.
    """

    num_steps: int
    num_planned_steps: int
    is_finished: bool


def stated_steps(adapter_dir: Path) -> TrainedSteps | None:
    """Read how far an adapter's run was from its card; None where the card does not say."""
    card = adapter_dir / CARD_NAME
    stated = card_metadata(card).get(_PROGRESS_KEY) if card.is_file() else None
    try:
        return TrainedSteps(**stated)  # type: ignore[arg-type]
    except TypeError:
        return None


def front_matter(
    base: BaseCheckpoint,
    *,
    relation: str,
    library_name: str,
    tags: list[str],
    datasets: list[str],
    steps: TrainedSteps | None = None,
) -> str:
    progress: dict[str, Any] = {} if steps is None else {_PROGRESS_KEY: vars(steps)}
    data = ModelCardData(
        base_model=base.hub_name,
        base_model_relation=relation if base.hub_name else None,
        datasets=list(dict.fromkeys(datasets)) or None,
        library_name=library_name,
        pipeline_tag="text-generation",
        tags=tags,
        **_licence(base.directory),
        **progress,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _licence(checkpoint_dir: Path) -> dict[str, Any]:
    """Read the licence that the base's own card states, if it has a card."""
    stated = card_metadata(checkpoint_dir / CARD_NAME)
    licence = {key: stated[key] for key in ("license", "license_name") if isinstance(stated.get(key), str)}
    # A link to a file beside the base's card leads nowhere from here.
    if str(stated.get("license_link", "")).startswith("https://"):
        licence["license_link"] = stated["license_link"]
    return licence if "license" in licence else {}


def local_path(path: Path | str) -> str:
    return f"`{path_name(path)}`"


def path_name(path: Path | str) -> str:
    return Path(path).absolute().name  # note: Path(".") has no name


def markdown_link(hub_name: str | None, kind: str = "") -> str | None:
    return f"[{hub_name}](https://huggingface.co/{kind}{hub_name})" if hub_name else None


def plain_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
