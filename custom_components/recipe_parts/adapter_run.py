"""A run that trains an adapter: its beginning, its state, its result."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from custom_components.config.components import instantiate
from custom_components.config.lora_settings import LoRASettings
from custom_components.datasets.training_data import RowsOfRun
from custom_components.recipe_parts.opening import Opening
from custom_components.recipe_parts.training import fitted_run
from custom_components.runs.adapter_card import TrainingFacts, adapter_card
from custom_components.runs.loss_plot import plot_losses
from custom_components.runs.report import describe_adapted_model
from custom_components.runs.run import Run
from custom_components.runs.run_directory import RunDirectory
from custom_components.runs.trained_weights import AdapterWeights
from custom_components.training.gradients import ForwardOptions
from custom_components.training.optimizer import adapter_parameter_groups
from custom_components.training.plan import Plan
from custom_components.training.state import TrainingState
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.adapter_settings import adapter_settings
from custom_components.weights.adapters import (
    check_adapter_fits,
    check_adapter_was_trained,
    copy_into_adapter,
    save_adapter,
)
from custom_components.weights.card import CARD_NAME, TrainedSteps
from custom_components.weights.checkpoint_loading import base_format, frozen_checksum, load_base_weights

AdapterOpening = Opening[LoRASettings, RowsOfRun[Any]]
SettingsType = TypeVar("SettingsType", bound=LoRASettings)


def adapter_to_begin_from(opening: AdapterOpening, *, also_resumed: bool = False) -> Mapping[str, Tensor]:
    """Open the adapter that the config names to begin from; empty: a new run begins with a new one.

    Args:
        also_resumed: also where the run goes on, because it still needs the adapter that it began from.

    Raises:
        UserError: it does not fit the model.
    """
    if opening.settings.init_adapter_from is None or (opening.resumed is not None and not also_resumed):
        return {}
    stored = open_adapter(opening.settings.init_adapter_from, "init_adapter_from")
    return check_adapter_fits(opening.model, stored)


def adapter_run(
    opening: Opening[SettingsType, RowsOfRun[Any]], directory: RunDirectory, start: Mapping[str, Tensor]
) -> tuple[Run[SettingsType], ForwardOptions]:
    """Load the base and the adapter to begin with, and make the run, see :func:`fitted_run`.

    Args:
        start: what :func:`adapter_to_begin_from` opened.
    """
    settings, machine, model = opening.settings, opening.machine, opening.model
    cache_dir = settings.quantized_cache_dir
    load_base_weights(model, opening.base, machine.dtype, machine.device, cache_dir, shards=opening.shards)
    copy_into_adapter(model, start)
    describe_adapted_model(model, machine.device, machine.dtype_words)
    weights = AdapterWeights(model, opening.base.name, opening.adapter_texts)
    return fitted_run(opening, weights, directory)


def new_adapter_state(run: Run[LoRASettings], data_digest: str, num_ranks: int = 1) -> TrainingState:
    """Make the state that a run begins with.

    Args:
        data_digest: of the rows to train on.
        num_ranks: whose forwards a step has.
    """
    groups = adapter_parameter_groups(run.weights.model, run.settings.optimizer["lr"], run.settings.lora_plus_ratio)
    return TrainingState(
        optimizer=instantiate(run.settings.optimizer, groups),
        scaler=torch.amp.GradScaler(run.device.type, enabled=run.dtype is torch.float16),
        data_digest=data_digest,
        num_ranks=num_ranks,
    )


@contextlib.contextmanager
def base_unchanged(run: Run[LoRASettings]) -> Iterator[None]:
    """With `verify_base`, prove after the block that no byte of the frozen base has changed in it."""
    before = frozen_checksum(run.weights.model) if run.settings.verify_base else None
    yield
    if before is not None and frozen_checksum(run.weights.model) != before:
        raise AssertionError("verify_base: the frozen base has changed")


def save_adapter_result(
    opening: AdapterOpening, run: Run[LoRASettings], plan: Plan, state: TrainingState, *, is_finished: bool
) -> None:
    """Save the adapter of the best validation, or else the last, with its card, and draw the plot.

    Raises:
        UserError: the run is finished and its adapter has learned nothing.
    """
    model, settings, progress = run.weights.model, run.settings, state.progress
    # note: not by load_state_dict, after which DoRA reads the base, of which a rank may have a share.
    with torch.no_grad():
        for name, value in state.best_adapter.items():
            model.get_parameter(name).copy_(value)
    if is_finished:
        check_adapter_was_trained(model)
    training = TrainingFacts(
        opening.base,
        adapter_settings(model),
        base_format(model),
        opening.prompt_format,
        settings.train_on,
        settings.training_hyperparameters(),
        settings.preference_loss,
    )
    steps = TrainedSteps(progress.num_steps, len(plan.steps), is_finished)
    card = adapter_card(training, opening.data.train, opening.data.validation, progress, steps, run.directory.metrics)
    texts = {**opening.adapter_texts, CARD_NAME: card}
    save_adapter(model, run.directory.result, opening.base.name, texts)
    plot_losses(run.directory.metrics, run.directory.plot)
