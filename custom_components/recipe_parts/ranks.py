"""What several ranks have in common, and are held against each other by, and what each of them computes."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import xxhash
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from custom_components.config.distributed_settings import DistributedSettings
from custom_components.datasets.batching import Batch
from custom_components.distributed.dealing import dealt
from custom_components.distributed.ranks import AgreedError, Ranks
from custom_components.distributed.sharding import LayerShards
from custom_components.memory.estimate import base_bytes
from custom_components.memory.fitting import fit_to_device
from custom_components.recipe_parts.adapter_run import AdapterOpening
from custom_components.recipe_parts.opening import Opening, RowsOfRunType
from custom_components.recipe_parts.step_choices import step_choices, step_parts, step_rows
from custom_components.recipe_parts.training import smallest_fit
from custom_components.runs.run import Run
from custom_components.runtime.process_memory import usable_bytes
from custom_components.runtime.terminal import say
from custom_components.training.plan import Plan, PlannedStep
from custom_components.training.state import TrainingState

# Of a device's usable memory: the rest is for adapters, optimizer and activations.
_BASE_SHARE = 0.8
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


@dataclass(frozen=True)
class Share:
    """The forwards of a step that a rank computes.

    Attributes:
        forwards: the rows of each, by index.
        seeds: of each.
        num_idle: forwards without work, that it takes part in.
    """

    forwards: list[list[int]]
    seeds: list[int]
    num_idle: int


def share_of(step: PlannedStep, lengths: Sequence[int], ranks: Ranks) -> Share:
    """Give the forwards of a step that this rank computes.

    Args:
        lengths: tokens of each row.
    """
    num_tokens = [sum(lengths[row] for row in rows) for rows in step.forwards]
    shares, seeds = dealt(num_tokens, ranks.num), step.seeds
    numbers = shares[ranks.place.rank]
    num_idle = max(map(len, shares)) - len(numbers)
    return Share([step.forwards[number] for number in numbers], [seeds[number] for number in numbers], num_idle)


def idle_batches(batch: Batch, num_batches: int) -> list[Batch]:
    """Make forwards that count nothing, for a rank without work: where the base is sharded, it gathers layers with it.

    Args:
        batch: any other.
    """
    num_tokens = min(2, batch.row_lengths[0])
    labels_1T = torch.full_like(batch.labels_1T[:, :num_tokens], CROSS_ENTROPY_IGNORE_IDX)
    tokens_1T, positions_1T = batch.tokens_1T[:, :num_tokens], batch.positions_1T[:, :num_tokens]
    return [Batch(tokens_1T, labels_1T, positions_1T, batch.supervised_P[:0], (num_tokens,))] * num_batches


def settled_parallelism(
    opening: Opening[DistributedSettings, RowsOfRunType],
) -> Opening[DistributedSettings, RowsOfRunType]:
    """Choose whether every rank has the whole base or a share, as the config says, and say so.

    Raises:
        AgreedError: the config asks for what a rank cannot do with a share.
    """
    settings, machine, ranks, model = opening.settings, opening.machine, opening.ranks, opening.model
    if ranks.num == 1:
        return opening
    num_bytes = base_bytes(model, machine.dtype)
    usable = usable_bytes(machine.device)
    if usable is not None and machine.device.type == "cpu":
        usable //= ranks.place.num_local_ranks
    amounts = [amount for amount in ranks.gathered(usable) if amount is not None]
    fits = not amounts or num_bytes <= _BASE_SHARE * min(amounts)
    parallelism = settings.parallelism
    if parallelism == "auto":
        parallelism = "replicate" if fits else "shard"
        usable_words = f"with {min(amounts) / 2**30:.1f} GiB usable" if amounts else "here"
        fits_words = "fits" if fits else "does not fit"
        say(f"parallelism: {parallelism}, a base of {num_bytes / 2**30:.1f} GiB {fits_words} a device {usable_words}")
    if parallelism == "replicate":
        return opening
    _refuse_what_needs_the_base(settings)
    parts = step_parts(settings, ranks.num)
    rows = step_rows(settings, opening.data.lengths, opening.data.pack_capacity_tokens)
    fit = smallest_fit(fit_to_device(step_choices(settings), model, rows, parts, machine.dtype, machine.device), ranks)
    settings = settings.model_copy(update={"compile": False})
    return replace(opening, settings=settings, fit=fit, shards=LayerShards(ranks, machine.device))


def _refuse_what_needs_the_base(settings: DistributedSettings) -> None:
    keys = ("sample_prompts", "verify_base", "quantized_cache", "init_lora_weights")
    values = {key: getattr(settings, key) for key in keys}
    values["compile"] = settings.compile is True
    if wrong := [key for key, value in values.items() if value]:
        words = "needs the whole base on each device, and it is sharded; delete it, or set parallelism=replicate"
        raise AgreedError(*(f"{key}: {words}" for key in wrong))


def _is_path(name: str) -> bool:
    return name in ("path", "source") or name.endswith(("_dir", "_path"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
