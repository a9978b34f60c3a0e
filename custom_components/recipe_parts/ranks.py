"""What several ranks have in common, and are held against each other by, and what each of them computes."""

import hashlib
import json
from collections.abc import Sequence

import xxhash

from custom_components.distributed.dealing import dealt
from custom_components.distributed.ranks import Ranks
from custom_components.recipe_parts.adapter_run import AdapterOpening
from custom_components.runs.run import Run
from custom_components.training.plan import Plan, PlannedStep
from custom_components.training.state import TrainingState

# Where a rank reads and writes may differ from machine to machine.
_PLACES = {"output_dir", "checkpoint_dir", "cache_dir", "init_adapter_from", "resume_from_checkpoint"}


def check_same_opening(opening: AdapterOpening) -> None:
    """Check that all ranks have opened the same.

    Raises:
        AgreedError: they have not.
    """
    settings, resumed = opening.settings, opening.resumed
    keys = {key: value for key, value in settings.model_dump(mode="json").items() if key not in _PLACES}
    for node in ("model", "tokenizer", "dataset", "dataset_val"):
        keys[node] = {name: value for name, value in (keys.get(node) or {}).items() if not _is_path(name)}
    data, validation = opening.data.train, opening.data.validation
    opening.ranks.check_same(
        {
            "the config": _digest(json.dumps(keys, sort_keys=True)),
            "the data": data.digest + ("" if validation is None else validation.digest),
            "the checkpoint to go on from": "none" if resumed is None else f"step {resumed.progress.num_steps}",
            "the device": opening.machine.device.type,
            "the dtype": str(opening.machine.dtype),
        }
    )


def check_same_plan(ranks: Ranks, plan: Plan) -> None:
    """Check that all ranks will take the same steps.

    Raises:
        AgreedError: they will not.
    """
    ranks.check_same({"the plan": _digest(repr(plan))})


def check_same_weights(ranks: Ranks, run: Run, state: TrainingState) -> None:
    """Check that all ranks have the same trained weights after the same number of steps.

    Raises:
        AgreedError: they have not.
    """
    digest = xxhash.xxh3_128()
    for parameter in run.weights.model.parameters():
        if parameter.requires_grad:
            digest.update(parameter.detach().cpu().contiguous().numpy().data)
    ranks.check_same({"the adapter": digest.hexdigest(), "the number of steps": str(state.progress.num_steps)})


def share_of(step: PlannedStep, lengths: Sequence[int], ranks: Ranks) -> tuple[list[list[int]], list[int]]:
    """Give the rows and the seeds of the forwards of a step that this rank computes.

    Args:
        lengths: tokens of each row.
    """
    num_tokens = [sum(lengths[row] for row in rows) for rows in step.forwards]
    numbers, seeds = dealt(num_tokens, ranks.num)[ranks.place.rank], step.seeds
    return [step.forwards[number] for number in numbers], [seeds[number] for number in numbers]


def _is_path(name: str) -> bool:
    return name in ("path", "source") or name.endswith(("_dir", "_path"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
