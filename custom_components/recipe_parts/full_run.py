"""A run that trains a model's own weights: its beginning, its state, its result."""

import torch
from torchtune.training.precision import PRECISION_STR_TO_DTYPE

from custom_components.config.components import instantiate
from custom_components.config.full_settings import FullSettings
from custom_components.datasets.training_data import Data
from custom_components.recipe_parts.opening import Opening
from custom_components.recipe_parts.training import fitted_run
from custom_components.runs.checkpoints import run_checkpoint_path
from custom_components.runs.loss_plot import plot_losses
from custom_components.runs.model_card import ModelFacts, model_card
from custom_components.runs.model_weights import (
    ModelWeights,
    check_model_was_trained,
    files_beside_weights,
    matrix_dtype,
    save_linked_model,
)
from custom_components.runs.report import describe_trained_model
from custom_components.runs.run import Run
from custom_components.runs.run_directory import RunDirectory
from custom_components.runtime.errors import UserError
from custom_components.runtime.terminal import say
from custom_components.training.gradients import ForwardOptions
from custom_components.training.optimizer_in_backward import OptimizerInBackward
from custom_components.training.plan import Plan
from custom_components.training.state import TrainingState
from custom_components.training.weights_dtype import trained_weights_dtype
from custom_components.weights.card import CARD_NAME, TrainedSteps
from custom_components.weights.checkpoint_loading import load_base_weights

_DTYPE_NAMES = {dtype: name for name, dtype in PRECISION_STR_TO_DTYPE.items()}


def full_run(opening: Opening[FullSettings, Data], directory: RunDirectory) -> tuple[Run[FullSettings], ForwardOptions]:
    """Load the weights to begin with, and make the run, see :func:`fitted_run`.

    Raises:
        UserError: the optimizer is to step in the backward, and the computation is in fp16.
    """
    settings, machine, model = opening.settings, opening.machine, opening.model
    if settings.optimizer_in_backward and machine.dtype is torch.float16:
        raise UserError(
            "optimizer_in_backward: true, and dtype auto is fp16 here, which may have to take a step back; set "
            "dtype=fp32, or false"
        )
    trained_dtype, words = trained_weights_dtype(settings.optimizer, machine.dtype, machine.device)
    load_base_weights(model, opening.base, machine.dtype, machine.device, trained_dtype=trained_dtype)
    describe_trained_model(model, machine.device, machine.dtype_words, _DTYPE_NAMES[trained_dtype])
    if words is not None:
        say(words)
    transform, prompt_format = opening.data.tokenizer, opening.prompt_format
    files = files_beside_weights(directory.path, opening.base, transform, prompt_format, matrix_dtype(model))
    return fitted_run(opening, ModelWeights(model, opening.base, files), directory)


def new_full_state(run: Run[FullSettings], data_digest: str) -> TrainingState:
    """Make the state that a run begins with.

    Args:
        data_digest: of the rows to train on.
    """
    node = run.settings.optimizer
    trained = [parameter for parameter in run.weights.model.parameters() if parameter.requires_grad]
    groups = [{"params": trained, "lr": node["lr"]}]
    in_backward = run.settings.optimizer_in_backward
    return TrainingState(
        OptimizerInBackward(groups, lambda group: instantiate(node, group))
        if in_backward
        else instantiate(node, groups),
        torch.amp.GradScaler(run.device.type, enabled=run.dtype is torch.float16),
        data_digest,
    )


def save_model_result(
    opening: Opening[FullSettings, Data], run: Run[FullSettings], plan: Plan, state: TrainingState, *, is_finished: bool
) -> None:
    """Make a result of the checkpoint of the best validation, or else of the last step, and draw the plot.

    Raises:
        UserError: the run is finished and its model has learned nothing.
    """
    settings, progress = run.settings, state.progress
    if is_finished:
        check_model_was_trained(run.weights.model, opening.base)
    facts = ModelFacts(opening.base, opening.prompt_format, settings.train_on, settings.training_hyperparameters())
    steps = TrainedSteps(progress.num_steps, len(plan.steps), is_finished)
    card = model_card(facts, opening.data, progress, steps, run.directory.metrics)
    step = progress.num_steps if progress.best_step is None else progress.best_step
    checkpoint = run_checkpoint_path(run.directory.path, step)
    save_linked_model(checkpoint / run.weights.name, run.directory.result, {CARD_NAME: card})
    plot_losses(run.directory.metrics, run.directory.plot)
