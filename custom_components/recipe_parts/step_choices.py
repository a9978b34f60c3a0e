"""What a training config says of its steps, as the values that estimating and fitting their memory take."""

from collections.abc import Sequence
from functools import partial

import torch

from custom_components.config.components import instantiate
from custom_components.config.training_settings import TrainingSettings
from custom_components.memory.estimate import StepParts
from custom_components.memory.fitting import Fit, StepChoices, StepRows
from custom_components.models.host_inputs import HostInputs
from custom_components.models.layer_in_pieces import KEPT_IN_PLACE
from custom_components.training.gradients import ForwardOptions


def step_choices(settings: TrainingSettings) -> StepChoices:
    """Read what the config leaves open of how a step is computed."""
    return StepChoices(
        settings.batch_size,
        settings.gradient_accumulation_steps,
        recomputes=settings.enable_activation_checkpointing,
        offloads_inputs=settings.enable_activation_offloading,
    )


def step_parts(settings: TrainingSettings, num_shards: int = 1) -> StepParts:
    """Make what takes memory in a step, besides the model and the rows.

    Args:
        num_shards: the devices that each keep a share of the base.
    """
    return StepParts(
        loss_function=instantiate(settings.position_loss),
        new_optimizer=partial(instantiate, settings.optimizer),
        neftune_noise_alpha=settings.neftune_noise_alpha,
        frees_gradients=settings.frees_gradients,
        accumulates=settings.gradient_accumulation_steps > 1,
        num_shards=num_shards,
    )


def step_rows(settings: TrainingSettings, lengths: Sequence[int], pack_capacity_tokens: int | None) -> StepRows:
    """Read how rows of these lengths make a forward.

    Args:
        lengths: in tokens.
        pack_capacity_tokens: the tokens of a pack, used where the config packs rows.
    """
    return StepRows(lengths, settings.num_row_dialogs, pack_capacity_tokens if settings.packed else None)


def forward_options(settings: TrainingSettings, device: torch.device, fit: Fit) -> ForwardOptions:
    """Read how the forward of a training step is computed."""
    return ForwardOptions(
        num_recomputed_layers=fit.recomputing.num_layers,
        neftune_noise_alpha=settings.neftune_noise_alpha,
        layer_inputs=HostInputs(device) if fit.recomputing.offloads_inputs else KEPT_IN_PLACE,
    )


def with_forwards_of(settings: TrainingSettings, num_ranks: int) -> TrainingSettings:
    """Give the settings of a run whose steps have the forwards of so many ranks, however many compute them."""
    num_forwards = num_ranks * settings.gradient_accumulation_steps
    return settings.model_copy(update={"gradient_accumulation_steps": num_forwards})


def fitted_settings(settings: TrainingSettings, fit: Fit) -> TrainingSettings:
    """Give the settings of a run that leave nothing to choose: `batch_size` is a number."""
    chosen = {"batch_size": fit.batch_size, "gradient_accumulation_steps": fit.gradient_accumulation_steps}
    return settings.model_copy(update=chosen)
