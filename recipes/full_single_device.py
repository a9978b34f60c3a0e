"""Fine-tune all weights of a Llama-architecture model on one device, or those that `train_only` names.

tune run recipes/full_single_device.py --config configs/llama2_7b_full.yaml 'train_only=[layers.3?, norm, output]'
"""

import sys
import time

from custom_components.config.full_settings import FullSettings
from custom_components.config.reading import load_settings
from custom_components.datasets.training_data import Data
from custom_components.generation.sample_answers import answer_sample_prompts
from custom_components.memory.step_limit import StepLimit
from custom_components.recipe_parts.full_run import full_run, new_full_state, save_model_result
from custom_components.recipe_parts.opening import directory_of_run, open_rows, open_training
from custom_components.recipe_parts.training import (
    close_training,
    plan_of_run,
    supervised_losses,
    training_begun,
)
from custom_components.runs.checkpoint_saver import CheckpointSaver
from custom_components.runs.metric_logger import MetricLogger
from custom_components.runs.run import Run
from custom_components.runs.training_log import TrainingLog
from custom_components.runtime.errors import run_recipe
from custom_components.runtime.stopping import stop_requests
from custom_components.training.compiling import compiled_optimizer
from custom_components.training.gradients import Losses, accumulate_gradients, validation_loss
from custom_components.training.plan import Plan
from custom_components.training.state import TrainingState
from custom_components.training.step import begin_step, counts_of, finish_step


def recipe_main() -> None:
    opening = open_training(load_settings(FullSettings, sys.argv[1:]), open_rows)
    data = opening.data
    with directory_of_run(opening) as directory:
        run, options = full_run(opening, directory)
        losses = supervised_losses(run, options)
        plan = plan_of_run(opening, run)
        state = new_full_state(run, data.train.digest)
        answers_before = answer_sample_prompts(run.weights.model, data.tokenizer, run.settings.sample_prompts)
        with compiled_optimizer(run.device), training_begun(opening, run, plan, state) as logger:
            signal_number = train(run, data, plan, state, losses, logger)
        save_model_result(opening, run, plan, state, is_finished=signal_number is None)
        close_training(opening, run, plan, state, answers_before, signal_number, __file__)


def train(
    run: Run[FullSettings], data: Data, plan: Plan, state: TrainingState, losses: Losses, logger: MetricLogger
) -> int | None:
    """Train the run's model and keep `state`, in place, from the state's step to the last or until asked to stop.

    Returns:
        the signal that asked to stop, after its step was saved; None: the run is finished.
    """
    settings, progress, model = run.settings, state.progress, run.weights.model
    validation_batches = data.validation_batches(plan.batch_size)
    checkpoints = CheckpointSaver(run, settings.save_every_minutes, settings.keep_last_n_checkpoints)
    step_limit = StepLimit(run.device, plan.batch_size)
    model.train()
    with TrainingLog(run, logger, len(plan.steps), progress.num_steps) as log, stop_requests() as stop:
        for step in plan.steps[progress.num_steps :]:
            if progress.stops_early(settings.early_stopping_patience):
                log.say(f"stopped early: {progress.num_validations_since_best} validations without a better loss")
                break
            start_seconds = time.perf_counter()
            begin_step(step, state)
            batches = data.batches(step.forwards)
            with step_limit.step(step.number, batches):
                mean_loss = accumulate_gradients(batches, losses.training, state.scaler, run.device, step.seeds)
            result = finish_step(step, state, counts_of(batches), mean_loss, settings.clip_grad_norm, start_seconds)
            log.step(step, result)
            is_best = False
            if step.validates:
                val_loss = validation_loss(model, validation_batches, losses.validation, run.device)
                log.validation(step, val_loss)
                is_best = progress.add_validation(val_loss)
                log.samples(step, answer_sample_prompts(model, data.tokenizer, settings.sample_prompts))
            stops = stop.is_asked or progress.stops_early(settings.early_stopping_patience)
            # The best weights are kept as the checkpoint of their step, not a second time in memory.
            checkpoints.save_if_due(step, state, now=stops or is_best)
            if stop.is_asked:
                break
    return stop.signal_number


if __name__ == "__main__":
    run_recipe(recipe_main)
