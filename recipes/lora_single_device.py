"""Fine-tune a Llama-architecture model on one device with LoRA or QLoRA.

tune run recipes/lora_single_device.py --config configs/llama2_7b_qlora.yaml lora_rank=32
"""

import sys
import time

import torch
from torchtune.modules import TransformerDecoder

from custom_components.config.components import instantiate
from custom_components.config.reading import load_settings
from custom_components.config.training_settings import TrainingSettings, refuse_cuda_only_settings
from custom_components.datasets.tokenized_rows import split_validation
from custom_components.datasets.training_data import Data
from custom_components.generation.sample_answers import answer_sample_prompts, show_answers
from custom_components.memory.fitting import describe_fit, fit_to_device, fitted_settings, forward_options, tried_fit
from custom_components.memory.step_limit import StepLimit
from custom_components.models.hidden_states import num_layers_with_backward
from custom_components.models.nf4_product import DENSE_WEIGHT_MEMORY
from custom_components.runs.adapter_card import TrainingFacts, adapter_card
from custom_components.runs.checkpoints import delete_checkpoints_after, save_run_checkpoint, try_to_save
from custom_components.runs.loss_plot import plot_losses
from custom_components.runs.metric_logger import MetricLogger, metric_logger
from custom_components.runs.metrics import keep_metrics_until
from custom_components.runs.report import closing_summary, describe_model, stopped_summary
from custom_components.runs.resuming import AUTO, ResumedRun, open_run_to_resume
from custom_components.runs.run import Run
from custom_components.runs.run_directory import RunDirectory, begin_in, check_results, run_directory
from custom_components.runs.training_log import StepResult, TrainingLog
from custom_components.runtime.devices import resolved_device, resolved_dtype
from custom_components.runtime.errors import run_recipe
from custom_components.runtime.host_allocator import keep_freed_memory, return_freed_memory
from custom_components.runtime.process_memory import PeakMemory
from custom_components.runtime.stopping import SaveClock, stop_requests
from custom_components.runtime.terminal import say
from custom_components.training.compiling import compiled_layers
from custom_components.training.gradients import Losses, accumulate_gradients, supervised_loss, validation_loss
from custom_components.training.optimizer import adapter_parameter_groups, clip_gradients, set_rates, update_adapters
from custom_components.training.plan import Plan, long_warmup, plan_of
from custom_components.training.state import TrainingState
from custom_components.transforms.llama2_chat import Llama2ChatTransform, fit_tokenizer
from custom_components.transforms.prompt_format import PromptFormat
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.adapter_settings import adapter_settings
from custom_components.weights.adapters import (
    check_adapter_fits,
    check_adapter_was_trained,
    copy_into_adapter,
    save_adapter,
)
from custom_components.weights.card import CARD_NAME, TrainedSteps
from custom_components.weights.checkpoint_files import open_checkpoint
from custom_components.weights.checkpoint_loading import check_base_weights, frozen_checksum, load_base_weights


def recipe_main() -> None:
    start_seconds = time.perf_counter()
    settings = load_settings(TrainingSettings, sys.argv[1:])
    resumes = settings.resume_from_checkpoint is not False
    check_results(settings.output_dir, overwrite=settings.overwrite_output_dir, resumes=resumes)
    device = resolved_device(settings.device)
    dtype, dtype_words = resolved_dtype(settings.dtype, device)
    refuse_cuda_only_settings(settings, device)
    memory = PeakMemory(device)
    keep_freed_memory()
    torch.manual_seed(settings.seed)

    with torch.device("meta"):
        model = instantiate(settings.model)
    data = open_data(settings, fit_tokenizer(instantiate(settings.tokenizer), model))
    say(data.account)
    lengths, max_seq_len = data.train.lengths, data.tokenizer.max_seq_len
    resumed = open_run_to_resume(settings.resume_from_checkpoint, settings.output_dir)
    asked = settings if resumed is None else resumed.checked_settings(settings)
    if resumed is not None and settings.resume_from_checkpoint == AUTO and is_finished(asked, data, resumed):
        say(f"{settings.output_dir}: the run is finished, {resumed.progress.num_steps} steps; nothing is left to do")
        return
    base = open_checkpoint(settings.checkpoint_dir)
    check_base_weights(model, base)
    start_adapter = None
    if settings.init_adapter_from is not None and resumed is None:
        start_adapter = check_adapter_fits(model, open_adapter(settings.init_adapter_from))
    fit = fit_to_device(asked, model, lengths, max_seq_len, dtype, device)

    resumes_here = resumed is not None and resumed.is_inside(settings.output_dir)
    overwrites = not resumes_here and (settings.overwrite_output_dir or begins_again(settings, resumed))
    with run_directory(settings.output_dir, overwrite=overwrites, resumes=resumes_here) as directory:
        load_base_weights(model, base, dtype, device, settings.quantized_cache_dir)
        return_freed_memory()
        if start_adapter is not None:
            copy_into_adapter(model, start_adapter)
        describe_model(model, device, dtype_words, is_base_quantized=settings.quantize_base)
        fit = tried_fit(fit, model, asked, lengths, max_seq_len, device)
        describe_fit(fit, asked, num_layers_with_backward(model))
        prompt_format = PromptFormat(settings.prompt_template, data.tokenizer.system_prompt, data.tokenizer.stop_pieces)
        run = Run(fitted_settings(asked, fit), base, prompt_format, device, dtype, directory, memory)
        answers_before = answer_sample_prompts(model, data.tokenizer, settings.sample_prompts)
        base_checksum = frozen_checksum(model) if settings.verify_base else None

        plan = plan_of(run.settings, lengths, max_seq_len, has_validation=data.validation is not None)
        if words := long_warmup(plan, run.settings.optimizer["lr"]):
            print(words)
        state = new_state(run, model, data)
        if resumed is not None:
            resumed.restore(model, state)
        try_to_save(directory.path, model, state, run.beside)
        loss_function = instantiate(settings.loss)
        losses = Losses(
            training=supervised_loss(model, loss_function, forward_options(settings, fit)),
            validation=supervised_loss(model, loss_function),
        )
        with metric_logger(settings.metric_logger, None if resumed is None else resumed.directory) as logger:
            begin_in(directory, run.beside.config, overwrites=overwrites)
            if resumed is not None:
                go_on_in(directory, resumed, state.progress.num_steps)
            with compiled_layers(model, settings.compile, device, plan.num_forwards):
                signal_number = train(run, model, data, plan, state, losses, logger)
        DENSE_WEIGHT_MEMORY.release()

        if base_checksum is not None and frozen_checksum(model) != base_checksum:
            raise AssertionError("verify_base: the frozen base has changed")
        save_result(run, model, data, state, len(plan.steps), is_finished=signal_number is None)
        if signal_number is not None:
            say(stopped_summary(state.progress, len(plan.steps), directory, [__file__, *sys.argv[1:]]))
            sys.exit(128 + signal_number)
        answers_after = answer_sample_prompts(model, data.tokenizer, settings.sample_prompts)
        show_answers(settings.sample_prompts, answers_before, answers_after)
        say(closing_summary(state.progress, time.perf_counter() - start_seconds, memory, directory))


def open_data(settings: TrainingSettings, tokenizer: Llama2ChatTransform) -> Data:
    """Open the rows to train on, and those to validate on, if any."""
    # What the adapter learns with is what validation and generation use.
    tokenizer = tokenizer.with_system_prompt(settings.dataset.get("system_prompt"))
    dataset = instantiate(settings.dataset, tokenizer=tokenizer)
    if settings.val_fraction is not None:
        return Data(*split_validation(dataset, settings.val_fraction, settings.seed), tokenizer)
    if settings.dataset_val is not None:
        return Data(dataset, instantiate(settings.dataset_val, tokenizer=tokenizer), tokenizer)
    return Data(dataset, None, tokenizer)


def is_finished(settings: TrainingSettings, data: Data, resumed: ResumedRun) -> bool:
    """Tell whether the run that `settings` describe has its result."""
    plan = plan_of(settings, data.train.lengths, data.tokenizer.max_seq_len, has_validation=False)
    return resumed.is_inside(settings.output_dir) and resumed.is_finished(
        len(plan.steps), settings.early_stopping_patience
    )


def begins_again(settings: TrainingSettings, resumed: ResumedRun | None) -> bool:
    """Tell whether a run in output_dir died before its first checkpoint, and is to begin again."""
    is_auto = resumed is None and settings.resume_from_checkpoint == AUTO
    return is_auto and RunDirectory(settings.output_dir).has_only_begun


def new_state(run: Run, model: TransformerDecoder, data: Data) -> TrainingState:
    """Make the state that a run begins with."""
    groups = adapter_parameter_groups(model, run.settings.optimizer["lr"], run.settings.lora_plus_ratio)
    return TrainingState(
        optimizer=instantiate(run.settings.optimizer, groups),
        scaler=torch.amp.GradScaler(run.device.type, enabled=run.dtype is torch.float16),
        data_digest=data.train.digest,
    )


def train(
    run: Run,
    model: TransformerDecoder,
    data: Data,
    plan: Plan,
    state: TrainingState,
    losses: Losses,
    logger: MetricLogger,
) -> int | None:
    """Train `model` and keep `state`, in place, from the state's step to the last or until asked to stop.

    Returns:
        the signal that asked to stop, after its step was saved; None: the run is finished.
    """
    settings, progress = run.settings, state.progress
    validation_batches = data.validation_batches(plan.batch_size)
    peak_rates = [group["lr"] for group in state.optimizer.param_groups]
    save_clock = SaveClock(settings.save_every_minutes)
    step_limit = StepLimit(run.device, plan.batch_size)
    model.train()
    with TrainingLog(run, logger, len(plan.steps), progress.num_steps) as log, stop_requests() as stop:
        for step in plan.steps[progress.num_steps :]:
            if progress.stops_early(settings.early_stopping_patience):
                log.say(f"stopped early: {progress.num_validations_since_best} validations without a better loss")
                break
            start_seconds = time.perf_counter()
            torch.manual_seed(step.seed)  # for dropout and NEFTune's noise
            set_rates(state.optimizer, peak_rates, step.rate_factor)
            batches = data.batches(step.forwards)
            with step_limit.step(step.number, batches):
                mean_loss = accumulate_gradients(batches, losses.training, state.scaler, run.device)
            norm = clip_gradients(state.optimizer, state.scaler, settings.clip_grad_norm)
            loss, grad_norm = torch.stack([mean_loss, norm]).tolist()  # note: the step's one CPU-GPU sync point
            is_skipped = update_adapters(state.optimizer, state.scaler, loss, grad_norm, step.number, step.forwards)
            seconds = time.perf_counter() - start_seconds
            progress.add_step(sum(batch.num_tokens for batch in batches), seconds, is_skipped)
            log.step(step, batches, StepResult(loss, grad_norm, state.optimizer.param_groups[0]["lr"], seconds))
            if step.validates:
                val_loss = validation_loss(model, validation_batches, losses.validation, run.device)
                log.validation(step, val_loss)
                if progress.add_validation(val_loss):
                    state.keep_best(model)
                log.samples(step, answer_sample_prompts(model, data.tokenizer, settings.sample_prompts))
            stops = stop.is_asked or progress.stops_early(settings.early_stopping_patience)
            if step.saves or stops or save_clock.is_due:
                save_run_checkpoint(run.directory.path, model, state, run.beside, settings.keep_last_n_checkpoints)
                save_clock.restart()
            if stop.is_asked:
                break
    return stop.signal_number


def save_result(
    run: Run, model: TransformerDecoder, data: Data, state: TrainingState, num_planned_steps: int, *, is_finished: bool
) -> None:
    """Save the adapter of the best validation, or else the last, with its card, and draw the plot."""
    model.load_state_dict(state.best_adapter, strict=False)
    if is_finished:
        check_adapter_was_trained(model)
    training = TrainingFacts(
        run.base,
        adapter_settings(model),
        run.settings.quantize_base,
        run.prompt_format,
        run.settings.train_on,
        run.settings.training_hyperparameters(),
    )
    steps = TrainedSteps(state.progress.num_steps, num_planned_steps, is_finished)
    card = adapter_card(training, data.train, data.validation, state.progress, steps, run.directory.metrics)
    texts = {**run.beside.adapter_texts, CARD_NAME: card}
    save_adapter(model, run.directory.adapter, run.beside.base_model, texts)
    plot_losses(run.directory.metrics, run.directory.plot)


def go_on_in(directory: RunDirectory, resumed: ResumedRun, num_steps: int) -> None:
    """Cut a run's records to the steps of its checkpoint; those of a run elsewhere are copied."""
    say(f"going on from {resumed.path}")
    delete_checkpoints_after(directory.path, num_steps)
    so_far = resumed.directory
    for before, records in ((so_far.metrics, directory.metrics), (so_far.samples, directory.samples)):
        if before.exists():
            keep_metrics_until(before, records, num_steps)


if __name__ == "__main__":
    run_recipe(recipe_main)
