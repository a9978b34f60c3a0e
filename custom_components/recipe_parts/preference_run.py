"""A run that learns preferences: its pairs, and how the reference model rates them."""

import hashlib
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor
from tqdm import tqdm

from custom_components.config.components import bound, instantiate
from custom_components.config.preference_settings import PreferenceSettings
from custom_components.datasets.batching import BatchPlan
from custom_components.datasets.pair_rows import PreferenceDataset
from custom_components.datasets.training_data import PairData
from custom_components.recipe_parts.opening import Opening, open_rows_as
from custom_components.runs.reference_file import Ratings, ReferenceKey, read_reference, write_reference
from custom_components.runs.run import Run
from custom_components.runs.run_directory import RunDirectory
from custom_components.runtime.errors import UserError
from custom_components.runtime.terminal import say
from custom_components.training.gradients import ForwardOptions
from custom_components.training.preference import (
    MeasuredLosses,
    PairMeasures,
    preference_loss,
    reference_log_probabilities,
)
from custom_components.training.preference_losses import needs_reference
from custom_components.transforms.chat_transform import ChatTransform
from custom_components.weights.adapters import adapter_settings
from custom_components.weights.checkpoint_loading import base_format, frozen_checksum

PreferenceOpening = Opening[PreferenceSettings, PairData]


@dataclass(frozen=True)
class Reference:
    """How the reference model rates the pairs of a run.

    Attributes:
        key: all that determines the ratings.
        ratings: of the pairs to train on, and of those to validate on, if any.
    """

    key: ReferenceKey
    ratings: list[Ratings]

    def rated(self, data: PairData) -> PairData:
        """Give the same pairs, each with its ratings."""
        train, *others = map(np.array, self.ratings)
        validation = None if data.validation is None else data.validation.with_reference(*others)
        return PairData(data.train.with_reference(train), validation, data.tokenizer)

    def keep(self, directory: RunDirectory) -> None:
        """Write it to a run's directory, for the run to go on with, or for the next with the same key."""
        write_reference(directory.reference, self.key, self.ratings)


def open_pairs(settings: PreferenceSettings, tokenizer: ChatTransform) -> PairData:
    """Open the pairs to train on, and those to validate on, if any."""
    return open_rows_as(PairData, settings, tokenizer)


def reference_of_run(
    opening: PreferenceOpening, run: Run[PreferenceSettings], start: Mapping[str, Tensor]
) -> Reference | None:
    """Rate every pair once with the reference model, or read how an earlier process did; None: the loss needs none.

    The reference is the model as the run begins, without dropout: the base, because a new adapter changes nothing; or,
    after supervised fine-tuning, the adapter that the run begins from.

    Args:
        run: its model is as the run begins, not yet as a checkpoint has it.
        start: the adapter to begin from; empty: a new one.

    Raises:
        UserError: the run goes on, and had another reference.
    """
    if not needs_reference(run.settings.loss["_component_"]):
        return None
    start_seconds = time.perf_counter()
    key, resumed = _key(opening, run, start), opening.resumed
    if resumed is not None and (resumed.config.get("init_adapter_from") is None) == bool(start):
        raise UserError(
            f"init_adapter_from: was {resumed.config.get('init_adapter_from')!r} when the run began, now "
            f"{run.settings.init_adapter_from and str(run.settings.init_adapter_from)!r}; it is the run's reference: "
            "set it back, or begin a new run"
        )
    for directory in [run.directory, *([resumed.directory] if resumed else [])]:
        ratings = read_reference(directory.reference, key, resumes=resumed is not None)
        if ratings is not None:
            how = f"read from {directory.reference}"
            break
    else:
        data = opening.data
        ratings = [_ratings(run, data, dataset) for dataset in (data.train, data.validation) if dataset is not None]
        how = f"computed in {time.perf_counter() - start_seconds:.1f} s"
    model = f"the adapter {run.settings.init_adapter_from}" if start else "the base, a new adapter changes nothing"
    say(f"reference: {model}; log-probabilities of {sum(map(len, ratings))} pairs {how}")
    return Reference(key, ratings)


def preference_losses(run: Run[PreferenceSettings], options: ForwardOptions) -> MeasuredLosses:
    """Make the losses of a run, each with measures of its own."""
    model, settings = run.weights.model, run.settings
    loss_function, log_losses = bound(settings.loss), instantiate(settings.position_loss)
    of_training, of_validation = PairMeasures(), PairMeasures()
    return MeasuredLosses(
        training=preference_loss(model, loss_function, log_losses, of_training, options),
        validation=preference_loss(model, loss_function, log_losses, of_validation),
        training_measures=of_training,
        validation_measures=of_validation,
    )


def _key(opening: PreferenceOpening, run: Run[PreferenceSettings], start: Mapping[str, Tensor]) -> ReferenceKey:
    data, adapter = opening.data, adapter_settings(run.weights.model)
    digest = hashlib.sha256(repr(replace(adapter, dropout=0.0)).encode())
    for name, tensor in sorted(start.items()):
        digest.update(name.encode() + tensor.cpu().float().numpy().tobytes())
    return ReferenceKey(
        pairs=[dataset.digest for dataset in (data.train, data.validation) if dataset is not None],
        base=frozen_checksum(run.weights.model),
        is_base_quantized=base_format(run.weights.model) is not None,
        dtype=str(run.dtype),
        max_seq_len=data.tokenizer.max_seq_len,
        prompt_template=run.settings.prompt_template,
        adapter=digest.hexdigest() if start else "new",
        variant=dict(adapter.flags),
    )


def _ratings(run: Run[PreferenceSettings], data: PairData, dataset: PreferenceDataset) -> Ratings:
    """Rate each pair of a data set once, in forwards as large as those of training."""
    settings = run.settings
    distinct, places = dataset.distinct()
    assert settings.batch_size != "auto"
    capacity_tokens = data.pack_capacity_tokens if settings.packed else None
    plan = BatchPlan(settings.batch_size, 1, shuffle=False, seed=0, pack_capacity_tokens=capacity_tokens)
    forwards = [rows for [rows] in plan.steps(distinct.lengths, epoch=0)]
    shown = tqdm(forwards, desc="rating pairs with the reference", unit="forward", leave=False, delay=2, disable=None)
    batches = (data.batch(distinct, rows) for rows in shown)
    log_losses = instantiate(settings.position_loss)
    rated = reference_log_probabilities(run.weights.model, batches, log_losses, run.device)
    by_row = dict(zip(itertools.chain(*forwards), rated, strict=True))
    return [by_row[place] for place in places]
