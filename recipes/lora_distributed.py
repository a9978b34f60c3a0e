"""Fine-tune a Llama-architecture model on several devices with LoRA or QLoRA, with the same result as on one.

tune run --nproc_per_node 4 recipes/lora_distributed.py --config configs/llama2_70b_qlora.yaml lora_rank=32
"""

import contextlib
import sys
import time
from functools import partial

from custom_components.config.distributed_settings import DistributedSettings
from custom_components.config.reading import load_settings
from custom_components.datasets.training_data import Data
from custom_components.distributed.ranks import ALONE, Ranks
from custom_components.distributed.running import ended_by, run_on_ranks
from custom_components.distributed.shared_gradients import SharedGradients
from custom_components.generation.sample_answers import answer_sample_prompts
from custom_components.memory.step_limit import StepLimit
from custom_components.recipe_parts.adapter_run import (
    adapter_run,
    adapter_to_begin_from,
    base_unchanged,
    new_adapter_state,
    save_adapter_result,
)
from custom_components.recipe_parts.opening import Opening, directory_of_run, open_rows, open_training
from custom_components.recipe_parts.ranks import (
    check_same_opening,
    check_same_plan,
    check_same_weights,
    idle_batches,
    settled_parallelism,
    share_of,
)
from custom_components.recipe_parts.training import (
    close_training,
    plan_of_run,
    supervised_losses,
    training_begun,
)
from custom_components.runs.checkpoint_saver import CheckpointSaver
from custom_components.runs.metric_logger import MetricLogger
from custom_components.runs.run import Run
from custom_components.runs.training_log import NoTrainingLog, TrainingLog
from custom_components.runtime.stopping import stop_requests
from custom_components.training.gradients import Losses, accumulate_gradients, validation_loss
from custom_components.training.plan import Plan
from custom_components.training.state import TrainingState
from custom_components.training.step import StepCounts, begin_step, counts_of, finish_step


def recipe_main(ranks: Ranks = ALONE) -> None:
    settings = ranks.agree(lambda: load_settings(DistributedSettings, sys.argv[1:]))
    device = ranks.agree(lambda: ranks.device_name(settings.device))
    ranks.begin(settings.collective_timeout_seconds, device)
    opening = ranks.agree(lambda: open_training(settings, open_rows, ranks), in_turn=True)
    check_same_opening(opening)
    opening = settled_parallelism(opening)
    data = opening.data
    start = ranks.agree(lambda: adapter_to_begin_from(opening))
    with contextlib.ExitStack() as stack:
        directory = ranks.agree(lambda: stack.enter_context(directory_of_run(opening)))
        load = partial(adapter_run, opening, directory, start)
        run, options = ranks.agree(load, in_turn=settings.quantized_cache)
        plan = ranks.agree(lambda: plan_of_run(opening, run))
        check_same_plan(ranks, plan)
        answers_before = _sample_answers(run, data, ranks)
        state = new_adapter_state(run, data.train.digest, opening.num_planned_ranks)
        losses = supervised_losses(run, options)
        with base_unchanged(run), contextlib.ExitStack() as begun:
            logger = ranks.agree(lambda: begun.enter_context(training_begun(opening, run, plan, state)))
            check_same_weights(ranks, run, state)
            signal_number = train(run, opening, plan, state, losses, logger)
            check_same_weights(ranks, run, state)
        if ranks.is_first:
            save_adapter_result(opening, run, plan, state, is_finished=signal_number is None)
            close_training(opening, run, plan, state, answers_before, signal_number, __file__)
    if signal_number is not None:
        sys.exit(128 + signal_number)


def train(
    run: Run[DistributedSettings],
    opening: Opening[DistributedSettings, Data],
    plan: Plan,
    state: TrainingState,
    losses: Losses,
    logger: MetricLogger,
) -> int | None:
    """Train the run's model and keep `state`, in place, from the state's step to the last or until asked to stop.

    Every rank computes a share of a step's forwards, and takes the same step with the sum of all gradients.

    Returns:
        the signal that asked to stop, after its step was saved; None: the run is finished.
    """
    settings, progress, model = run.settings, state.progress, run.weights.model
    data, ranks, is_sharded = opening.data, opening.ranks, opening.shards is not None
    lengths, all_batches = data.lengths, data.validation_batches(plan.batch_size)
    validation_batches = all_batches[ranks.place.rank :: ranks.num]
    if is_sharded and len(validation_batches) < len(all_batches[:: ranks.num]):
        validation_batches += idle_batches(all_batches[0], 1)
    checkpoints = CheckpointSaver(run, settings.save_every_minutes, settings.keep_last_n_checkpoints)
    step_limit = StepLimit(run.device, plan.batch_size)
    gradients = SharedGradients([parameter for parameter in model.parameters() if parameter.requires_grad], ranks)
    model.train()
    log = TrainingLog(run, logger, len(plan.steps), progress.num_steps) if ranks.is_first else NoTrainingLog()
    with log, stop_requests(ranks.answered_signals) as stop, ended_by(stop):
        for step in plan.steps[progress.num_steps :]:
            if progress.stops_early(settings.early_stopping_patience):
                log.say(f"stopped early: {progress.num_validations_since_best} validations without a better loss")
                break
            start_seconds = time.perf_counter()
            ranks.begin_step(step.number, checkpoints.last)
            begin_step(step, state)
            share = share_of(step, lengths, ranks)
            batches, seeds = data.batches(share.forwards), share.seeds
            counts = StepCounts(*ranks.summed_numbers(*counts_of(batches)))
            if is_sharded and share.num_idle:
                batches += idle_batches(data.batches(step.forwards[:1])[0], share.num_idle)
                seeds += [step.seed] * share.num_idle
            gradients.begin()
            with ranks.losses_named(), step_limit.step(step.number, batches):
                loss = accumulate_gradients(batches, losses.training, state.scaler, run.device, seeds, counts.num_units)
            mean_loss = gradients.summed(loss)
            result = finish_step(step, state, counts, mean_loss, settings.clip_grad_norm, start_seconds)
            log.step(step, result, {"tokens_per_second_per_device": counts.num_tokens / result.seconds / ranks.num})
            if step.validates:
                val_loss = validation_loss(model, validation_batches, losses.validation, run.device, ranks.summed)
                log.validation(step, val_loss)
                if progress.add_validation(val_loss):
                    state.keep_best(model)
                log.samples(step, _sample_answers(run, data, ranks))
            # The first signal that any rank has got is taken by all, after the same step.
            signal_number = ranks.largest(stop.signal_number or 0)
            stops = signal_number > 0 or progress.stops_early(settings.early_stopping_patience)
            if ranks.is_first:
                checkpoints.save_if_due(step, state, now=stops)
            if signal_number > 0:
                return signal_number
    return None


def _sample_answers(run: Run[DistributedSettings], data: Data, ranks: Ranks) -> list[str]:
    """Answer the config's sample prompts on the first rank, where they are shown; the others go on to wait for it."""
    if not ranks.is_first:
        return []
    return answer_sample_prompts(run.weights.model, data.tokenizer, run.settings.sample_prompts)


if __name__ == "__main__":
    run_on_ranks(recipe_main)
