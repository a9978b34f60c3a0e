"""The frame of a training recipe's loop: the run and its plan before it, the closing words after it."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial

from custom_components.config.training_settings import TrainingSettings
from custom_components.generation.sample_answers import answer_sample_prompts, show_answers
from custom_components.memory.fitting import describe_fit, fitted_settings, forward_options, tried_fit
from custom_components.models.hidden_states import num_layers_with_backward
from custom_components.models.nf4_product import DENSE_WEIGHT_MEMORY
from custom_components.recipe_parts.opening import Opening, Rows
from custom_components.runs.checkpoints import delete_checkpoints_after, try_to_save
from custom_components.runs.metric_logger import MetricLogger, metric_logger
from custom_components.runs.metrics import keep_metrics_until
from custom_components.runs.report import closing_summary, stopped_summary
from custom_components.runs.run import Run
from custom_components.runs.run_directory import RunDirectory, begin_in
from custom_components.runs.trained_weights import TrainedWeights
from custom_components.runtime.host_allocator import return_freed_memory
from custom_components.runtime.terminal import say, say_if_read
from custom_components.training.compiling import compiled_layers
from custom_components.training.gradients import ForwardOptions
from custom_components.training.plan import Plan, long_warmup, plan_of
from custom_components.training.state import TrainingState


def fitted_run(opening: Opening, weights: TrainedWeights, directory: RunDirectory) -> tuple[Run, ForwardOptions]:
    """Make the run, and say how the forwards of its steps are computed, once the model has its weights.

    What `auto` has chosen is tried on CUDA, made smaller until it fits, and said.
    """
    settings, machine, data = opening.settings, opening.machine, opening.data
    return_freed_memory()
    fit = tried_fit(opening.fit, opening.model, settings, data.lengths, data.pack_capacity_tokens, machine.device)
    describe_fit(fit, settings, num_layers_with_backward(opening.model))
    run = Run(fitted_settings(settings, fit), weights, machine.device, machine.dtype, directory, machine.memory)
    return run, forward_options(settings, fit)


def plan_of_run(settings: TrainingSettings, data: Rows) -> Plan:
    """Plan the steps of a run, and say so if its warm-up is longer than itself."""
    plan = plan_of(settings, data.lengths, data.pack_capacity_tokens, has_validation=data.has_validation)
    if words := long_warmup(plan, settings.optimizer["lr"]):
        say(words)
    return plan


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
    try_to_save(run.directory.path, run.weights, state, run.config)
    run_so_far = None if resumed is None else resumed.directory
    with metric_logger(run.settings.metric_logger, run.directory, run_so_far) as logger:
        logger.begin = partial(_begin, opening, run, logger, state.progress.num_steps)
        with compiled_layers(run.weights.model, run.settings.compile, run.device, plan.num_forwards):
            yield logger
    DENSE_WEIGHT_MEMORY.release()


def leave_if_stopped(run: Run, plan: Plan, state: TrainingState, signal_number: int | None, recipe: str) -> None:
    """End a process that was asked to stop, with the signal's exit code, and say how to go on.

    Args:
        signal_number: None: it was not asked to stop.
        recipe: the recipe's file.
    """
    if signal_number is not None:
        say_if_read(stopped_summary(run, state.progress, len(plan.steps), [recipe, *sys.argv[1:]]), sys.stdout)
        sys.exit(128 + signal_number)


def close_training(opening: Opening, run: Run, state: TrainingState, answers_before: Sequence[str]) -> None:
    """Show the answers to the config's sample prompts, before and after, and say what the run took and left."""
    prompts = run.settings.sample_prompts
    show_answers(prompts, answers_before, answer_sample_prompts(run.weights.model, opening.data.tokenizer, prompts))
    say(closing_summary(run, state.progress, time.perf_counter() - opening.machine.start_seconds))


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
