"""The frame of a training recipe's loop: the run and its plan before it, the closing words after it."""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial

from custom_components.config.components import instantiate
from custom_components.datasets.summary import counted
from custom_components.distributed.ranks import Ranks
from custom_components.generation.sample_answers import answer_sample_prompts, show_answers
from custom_components.memory.estimate import Recomputing, optimizer_bytes
from custom_components.memory.fitting import Fit, describe_fit, tried_fit
from custom_components.models.hidden_states import num_layers_with_backward
from custom_components.models.nf4_product import DENSE_WEIGHT_MEMORY
from custom_components.recipe_parts.opening import Opening
from custom_components.recipe_parts.step_choices import (
    fitted_settings,
    forward_options,
    step_choices,
    step_parts,
    step_rows,
    with_forwards_of,
)
from custom_components.runs.checkpoints import (
    check_room,
    delete_checkpoints_after,
    run_checkpoint_path,
    run_checkpoints,
    try_to_save,
)
from custom_components.runs.metric_logger import MetricLogger, metric_logger
from custom_components.runs.metrics import keep_metrics_until
from custom_components.runs.model_weights import ModelWeights, matrix_dtype
from custom_components.runs.report import closing_summary, stopped_summary
from custom_components.runs.run import Run
from custom_components.runs.run_directory import RunDirectory, begin_in
from custom_components.runs.trained_weights import TrainedWeights
from custom_components.runtime.errors import UserError
from custom_components.runtime.host_allocator import return_freed_memory
from custom_components.runtime.terminal import say
from custom_components.training.compiling import compiled_layers
from custom_components.training.gradients import ForwardOptions, Losses, supervised_loss
from custom_components.training.plan import Plan, long_warmup, plan_of
from custom_components.training.state import TrainingState


def fitted_run(opening: Opening, weights: TrainedWeights, directory: RunDirectory) -> tuple[Run, ForwardOptions]:
    """Make the run, and say how the forwards of its steps are computed, once the model has its weights.

    What `auto` has chosen is tried on CUDA, made smaller until it fits, and said.
    """
    settings, machine, model, data = opening.settings, opening.machine, opening.model, opening.data
    return_freed_memory()
    choices, options_of = step_choices(settings), partial(forward_options, settings, machine.device)
    rows = step_rows(settings, data.lengths, data.pack_capacity_tokens)
    fit = opening.fit
    if opening.shards is None:  # or ranks would have to try the same, and fail at the same
        fit = tried_fit(fit, choices, model, rows, step_parts(settings), options_of, machine.device)
    fit = smallest_fit(fit, opening.ranks)
    describe_fit(fit, choices, num_layers_with_backward(model))
    run = Run(fitted_settings(settings, fit), weights, machine.device, machine.dtype, directory, machine.memory)
    return run, options_of(fit)


def smallest_fit(fit: Fit, ranks: Ranks) -> Fit:
    """Choose for all ranks what fits the smallest of their cards."""
    fits = [
        Fit(batch_size, num_forwards, Recomputing(*recomputing), words)
        for batch_size, num_forwards, recomputing, words in ranks.gathered(dataclasses.astuple(fit))
    ]
    return min(fits, key=lambda fit: (fit.batch_size, -fit.recomputing.num_layers, not fit.recomputing.offloads_inputs))


def plan_of_run(opening: Opening, run: Run) -> Plan:
    """Plan the steps of a run, and say so if its warm-up is longer than itself, or it was begun on other devices.

    Raises:
        UserError: no step has a forward for each rank.
    """
    settings, data, num_ranks = run.settings, opening.data, opening.ranks.num
    of_all = with_forwards_of(settings, opening.num_planned_ranks)
    plan = plan_of(of_all, data.lengths, data.pack_capacity_tokens, has_validation=data.has_validation)
    num_forwards = max(len(step.forwards) for step in plan.steps)
    if num_forwards < num_ranks:
        raise UserError(
            f"--nproc_per_node: {num_ranks} processes were started, and a step of these rows has {num_forwards} "
            f"forwards; start at most {num_forwards}, or lower batch_size"
        )
    if num_ranks != opening.num_planned_ranks:
        say(
            f"the run was begun on {counted(opening.num_planned_ranks, 'device')}: a step keeps its "
            f"{of_all.gradient_accumulation_steps} forwards, now on {num_ranks}"
        )
    if words := long_warmup(plan, settings.optimizer["lr"]):
        say(words)
    return plan


def supervised_losses(run: Run, options: ForwardOptions) -> Losses:
    """Make the losses of supervised fine-tuning that the config names."""
    model, loss_function = run.weights.model, instantiate(run.settings.loss)
    return Losses(supervised_loss(model, loss_function, options), supervised_loss(model, loss_function))


@contextlib.contextmanager
def training_begun(opening: Opening, run: Run, plan: Plan, state: TrainingState) -> Iterator[MetricLogger]:
    """Bring a run to the step that it goes on from; it begins in its directory with the first record of a step.

    Inside the block layers are compiled, as the config says, and the metric logger is open.

    Raises:
        UserError: a checkpoint of another run, a disk too small, a logger that does not start.
    """
    resumed = opening.resumed
    if resumed is not None:
        resumed.restore(run.weights, state)
        say(f"going on from {resumed.path}")
        _forget_lost_best(run, state)
    writes = opening.ranks.is_first
    if writes:
        _try_disk(run, plan, state)
    run_so_far = None if resumed is None else resumed.directory
    with metric_logger(run.settings.metric_logger if writes else None, run.directory, run_so_far) as logger:
        if writes:
            logger.at_begin(partial(_begin, opening, run, logger, state.progress.num_steps))
        with compiled_layers(run.weights.model, run.settings.compile, run.device, plan.num_forwards):
            yield logger
    DENSE_WEIGHT_MEMORY.release()


def close_training(
    opening: Opening,
    run: Run,
    plan: Plan,
    state: TrainingState,
    answers_before: Sequence[str],
    signal_number: int | None,
    recipe: str,
) -> None:
    """Say what the run took and left, with the answers to the config's sample prompts, before training and after.

    A process that was asked to stop says how to go on, and ends here with the signal's exit code.

    Args:
        signal_number: of the signal that asked to stop; None: the run is finished.
        recipe: the recipe's file.
    """
    if signal_number is not None:
        say(stopped_summary(run, state.progress, len(plan.steps), [recipe, *sys.argv[1:]]))
        sys.exit(128 + signal_number)
    prompts = run.settings.sample_prompts
    show_answers(prompts, answers_before, answer_sample_prompts(run.weights.model, opening.data.tokenizer, prompts))
    say(closing_summary(run, state.progress, time.perf_counter() - opening.machine.start_seconds))


def _try_disk(run: Run, plan: Plan, state: TrainingState) -> None:
    """Find out whether the disk takes the checkpoints to come: an adapter's is written, a model's too large for that.

    Raises:
        UserError: it does not.
    """
    if not isinstance(run.weights, ModelWeights):
        try_to_save(run.directory.path, run.weights, state, run.config)
        return
    trained = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    num_bytes = run.weights.num_bytes + optimizer_bytes(
        partial(instantiate, run.settings.optimizer), trained, matrix_dtype(run.weights.model)
    )
    to_come = [step for step in plan.steps[state.progress.num_steps :] if step.saves or step.validates]
    has_best = any(step.validates for step in plan.steps)
    # The one that is written, those that are kept, and the best.
    num_at_a_time = 1 + run.settings.keep_last_n_checkpoints + has_best - len(run_checkpoints(run.directory.path))
    if to_come:
        check_room(run.directory.path, num_bytes, max(1, min(len(to_come), num_at_a_time)))


def _forget_lost_best(run: Run, state: TrainingState) -> None:
    """Take the next validation as the best so far, if the weights of the best are a checkpoint that is not here."""
    best_step = state.progress.best_step
    if not isinstance(run.weights, ModelWeights) or best_step is None:
        return
    if not run_checkpoint_path(run.directory.path, best_step).is_dir():
        say(f"the checkpoint of the best validation, step {best_step}, is not here: the next validation is the best")
        progress = state.progress
        progress.best_step, progress.best_val_loss, progress.num_validations_since_best = None, math.inf, 0


def _begin(opening: Opening, run: Run, logger: MetricLogger, num_done_steps: int) -> None:
    """Replace what is in the run's directory: results of an earlier run, records of steps that are taken anew.

    The records of a run that goes on elsewhere are copied.
    """
    directory = run.directory
    begin_in(directory, run.config, logger.log_config, overwrites=opening.overwrites)
    if opening.resumed is None:
        return
    delete_checkpoints_after(directory.path, num_done_steps)
    so_far = opening.resumed.directory
    for before, records in ((so_far.metrics, directory.metrics), (so_far.samples, directory.samples)):
        if before.exists():
            keep_metrics_until(before, records, num_done_steps)
