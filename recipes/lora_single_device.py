"""Fine-tune a Llama-architecture model on one device with LoRA or QLoRA.

tune run recipes/lora_single_device.py --config configs/llama2_7b_qlora.yaml lora_rank=32
"""

import math
import sys
import time
from pathlib import Path

import torch
from torchtune.modules import TransformerDecoder
from torchtune.training import OffloadActivations
from tqdm import tqdm

from custom_components.config.components import instantiate
from custom_components.config.reading import config_text, load_settings
from custom_components.config.training_settings import TrainingSettings, refuse_cuda_only_settings
from custom_components.datasets.batching import Batch, BatchPlan, collate
from custom_components.datasets.tokenized_rows import ChatDataset, split_validation
from custom_components.generation.sample_answers import answer_sample_prompts, show_answers
from custom_components.memory.fitting import Fit, describe_fit, fit_to_device, tried_fit
from custom_components.memory.step_limit import StepMemory
from custom_components.runs.adapter_card import TrainingFacts, adapter_card
from custom_components.runs.checkpoints import BesideWeights, find_checkpoint, load_checkpoint, save_checkpoint
from custom_components.runs.metrics import MetricsFile, keep_metrics_until, plot_losses, write_samples
from custom_components.runs.report import closing_summary, describe_model
from custom_components.runs.resuming import check_resumed_config, delete_checkpoints_after, with_batches_of
from custom_components.runs.run_directory import RunDirectory, run_directory
from custom_components.runtime.devices import resolved_device, resolved_dtype
from custom_components.runtime.errors import run_recipe
from custom_components.runtime.host_allocator import keep_freed_memory, return_freed_memory
from custom_components.runtime.process_memory import PeakMemory
from custom_components.runtime.stopping import stop_requests
from custom_components.training.compiling import compile_layers, compiles_layers
from custom_components.training.gradients import NOWHERE_ELSE, accumulate_gradients, validation_loss
from custom_components.training.optimizer import adapter_parameter_groups, clip_gradients, update_adapters
from custom_components.training.plan import plan_of
from custom_components.training.state import TrainingState
from custom_components.transforms.llama2_chat import Llama2ChatTransform, fit_tokenizer
from custom_components.transforms.prompt_format import PromptFormat
from custom_components.weights.adapters import (
    adapter_settings,
    check_adapter_fits,
    check_adapter_was_trained,
    copy_into_adapter,
    save_adapter,
)
from custom_components.weights.card import CARD_NAME
from custom_components.weights.checkpoint_files import base_model_name
from custom_components.weights.checkpoint_loading import check_checkpoint, frozen_checksum, load_base_weights


def recipe_main() -> None:
    start_seconds = time.perf_counter()
    settings = load_settings(TrainingSettings, sys.argv[1:])
    device = resolved_device(settings.device)
    dtype, dtype_words = resolved_dtype(settings.dtype, device)
    refuse_cuda_only_settings(settings, device)
    memory = PeakMemory(device)
    keep_freed_memory()
    torch.manual_seed(settings.seed)

    with torch.device("meta"):
        model = instantiate(settings.model)
    tokenizer = fit_tokenizer(instantiate(settings.tokenizer), model)
    # What the adapter learns with is what validation and generation use.
    tokenizer = tokenizer.with_system_prompt(settings.dataset.get("system_prompt"))
    dataset, dataset_val = training_and_validation(settings, tokenizer)
    print("\n".join(map(str, dataset.summaries)))

    resumed_from = find_checkpoint(settings.resume_from_checkpoint, settings.output_dir)
    if resumed_from is not None:
        settings = with_batches_of(resumed_from, settings)
        check_resumed_config(resumed_from, settings)
    check_checkpoint(model, settings.checkpoint_dir)
    init_adapter = None
    if settings.init_adapter_from is not None and resumed_from is None:
        init_adapter = check_adapter_fits(model, settings.init_adapter_from)

    fit = fit_to_device(settings, model, dataset.lengths, tokenizer.max_seq_len, dtype, device)
    resumes_here = resumed_from is not None and resumed_from.resolve().is_relative_to(settings.output_dir.resolve())
    with run_directory(settings.output_dir, overwrite=settings.overwrite_output_dir, resumes=resumes_here) as directory:
        quantized_cache_dir = settings.cache_dir if settings.quantized_cache else None
        load_base_weights(model, settings.checkpoint_dir, dtype, device, quantized_cache_dir)
        return_freed_memory()
        if init_adapter is not None:
            copy_into_adapter(model, init_adapter)
        describe_model(model, device, dtype_words, is_base_quantized=settings.quantize_base)
        fit = tried_fit(fit, model, settings, dataset.lengths, tokenizer.max_seq_len, device)
        describe_fit(fit, settings, len(model.layers))
        cut = {"batch_size": fit.batch_size, "gradient_accumulation_steps": fit.gradient_accumulation_steps}
        settings = settings.model_copy(update=cut)
        answers_before = answer_sample_prompts(model, tokenizer, settings.sample_prompts)
        base_checksum = frozen_checksum(model) if settings.verify_base else None

        groups = adapter_parameter_groups(model, settings.optimizer["lr"], settings.lora_plus_ratio)
        state = TrainingState(
            optimizer=instantiate(settings.optimizer, groups),
            scaler=torch.amp.GradScaler(device.type, enabled=dtype is torch.float16),
            data_digest=dataset.digest,
        )
        if resumed_from is not None:
            load_checkpoint(resumed_from, model, state)
            go_on_in(directory, resumed_from, state.progress.num_steps)
        prompt_format = PromptFormat(settings.prompt_template, tokenizer.system_prompt, ["</s>"])
        beside = BesideWeights(base_model_name(settings.checkpoint_dir), prompt_format.texts(), config_text(settings))
        directory.config.write_text(beside.config, encoding="utf-8")
        train(model, state, dataset, dataset_val, tokenizer, settings, fit, directory, beside, device, memory)

        if base_checksum is not None and frozen_checksum(model) != base_checksum:
            raise AssertionError("verify_base: the frozen base has changed")
        model.load_state_dict(state.best_adapter, strict=False)
        check_adapter_was_trained(model)
        training = TrainingFacts(
            settings.checkpoint_dir,
            adapter_settings(model),
            settings.quantize_base,
            prompt_format,
            settings.train_on,
            settings.training_hyperparameters(),
            settings.source_weights(),
        )
        card = adapter_card(training, dataset, dataset_val, state.progress, directory.metrics)
        texts = {**beside.adapter_texts, CARD_NAME: card}
        save_adapter(model, directory.adapter, beside.base_model, texts)
        plot_losses(directory.metrics, directory.plot)
        answers_after = answer_sample_prompts(model, tokenizer, settings.sample_prompts)
        show_answers(settings.sample_prompts, answers_before, answers_after)
        print(closing_summary(state.progress, time.perf_counter() - start_seconds, memory, directory))


def training_and_validation(
    settings: TrainingSettings, tokenizer: Llama2ChatTransform
) -> tuple[ChatDataset, ChatDataset | None]:
    """The rows to train on, and those to validate on, if any."""
    dataset = instantiate(settings.dataset, tokenizer=tokenizer)
    if settings.val_fraction is not None:
        return split_validation(dataset, settings.val_fraction, settings.seed)
    if settings.dataset_val is not None:
        return dataset, instantiate(settings.dataset_val, tokenizer=tokenizer)
    return dataset, None


def train(
    model: TransformerDecoder,
    state: TrainingState,
    dataset: ChatDataset,
    dataset_val: ChatDataset | None,
    tokenizer: Llama2ChatTransform,
    settings: TrainingSettings,
    fit: Fit,
    directory: RunDirectory,
    beside: BesideWeights,
    device: torch.device,
    memory: PeakMemory,
) -> None:
    """Train the adapters of `model` and keep `state`, in place, from the state's step to the last or until stopped."""
    plan = plan_of(settings, dataset.lengths, tokenizer.max_seq_len, has_validation=dataset_val is not None)
    steps = plan.steps
    batches_val = validation_batches(dataset_val, fit.batch_size)
    groups = adapter_parameter_groups(model, settings.optimizer["lr"], settings.lora_plus_ratio)
    peak_rates = [group["lr"] for group in groups]
    loss_function = instantiate(settings.loss)
    metrics = MetricsFile(directory.metrics)
    metric_logger = instantiate(settings.metric_logger) if settings.metric_logger else None
    step_memory = StepMemory(device)
    progress = state.progress
    activations_kept = OffloadActivations() if settings.enable_activation_offloading else NOWHERE_ELSE
    if compiles_layers(settings.compile, device, plan.num_forwards):
        compile_layers(model, is_optional=settings.compile == "auto")

    model.train()
    bar = tqdm(total=len(steps), initial=progress.num_steps, unit="step", desc="training", dynamic_ncols=True)
    with stop_requests() as stop_request:
        remaining = [] if progress.stops_early(settings.early_stopping_patience) else steps[progress.num_steps :]
        for planned in remaining:
            step = planned.number
            step_start_seconds = time.perf_counter()
            torch.manual_seed(planned.seed)  # dropout is a function of the step
            batches = [collate([dataset[row] for row in rows]) for rows in planned.forwards]
            for group, peak_rate in zip(state.optimizer.param_groups, peak_rates, strict=True):
                group["lr"] = peak_rate * planned.rate_factor

            largest_forward_tokens = max(batch.num_tokens for batch in batches)
            try:
                mean_loss = accumulate_gradients(
                    model,
                    batches,
                    loss_function,
                    state.scaler,
                    num_recomputed_layers=fit.num_recomputed_layers,
                    neftune_noise_alpha=settings.neftune_noise_alpha,
                    activations_kept=activations_kept,
                    device=device,
                )
            except torch.OutOfMemoryError:
                raise step_memory.error(step, largest_forward_tokens, fit.batch_size) from None
            step_memory.add_step(largest_forward_tokens)
            norm = clip_gradients(state.optimizer, state.scaler, settings.clip_grad_norm)
            loss, grad_norm = torch.stack([mean_loss, norm]).tolist()  # note: the step's one CPU-GPU sync point
            is_skipped = update_adapters(state.optimizer, state.scaler, loss, grad_norm, step, planned.forwards)

            num_tokens, seconds = sum(batch.num_tokens for batch in batches), time.perf_counter() - step_start_seconds
            progress.add_step(num_tokens, seconds, is_skipped)
            record = {
                "step": step,
                "epoch": planned.epoch,
                "loss": loss,
                "lr": state.optimizer.param_groups[0]["lr"],
                "grad_norm": grad_norm,
                "tokens": num_tokens,
                "supervised_tokens": sum(batch.num_supervised_tokens for batch in batches),
                "step_seconds": seconds,
                "tokens_per_second": num_tokens / seconds,
                "peak_memory_gib": memory.gib(),
            }
            metrics.write(record)
            if metric_logger is not None and step % settings.log_every_n_steps == 0:
                metric_logger.log_dict({key: value for key, value in record.items() if value is not None}, step=step)
            bar.update()
            bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)

            if planned.validates:
                val_loss = validation_loss(model, batches_val, loss_function, device)
                metrics.write({"step": step, "val_loss": val_loss, "val_perplexity": math.exp(val_loss)})
                if progress.add_validation(val_loss):
                    state.keep_best(model)
                if settings.sample_prompts:
                    answers = answer_sample_prompts(model, tokenizer, settings.sample_prompts)
                    write_samples(directory.samples, step, settings.sample_prompts, answers)
            stops_early = progress.stops_early(settings.early_stopping_patience)
            if planned.saves or stops_early or stop_request.signal_number is not None:
                save_checkpoint(directory.path, model, state, beside, settings.keep_last_n_checkpoints)
            stop_request.leave_if_asked()
            if stops_early:
                bar.write(f"stopped early: {progress.num_validations_since_best} validations without a better loss")
                break
    bar.close()
    metrics.close()
    if metric_logger is not None:
        metric_logger.close()


def go_on_in(directory: RunDirectory, checkpoint: Path, num_steps: int) -> None:
    """Bring a run's records to where its checkpoint stands; those of a run elsewhere are copied."""
    print(f"going on from {checkpoint}")
    delete_checkpoints_after(directory.path, num_steps)
    run_before = RunDirectory(checkpoint.parent.parent)
    for before, records in ((run_before.metrics, directory.metrics), (run_before.samples, directory.samples)):
        if before.exists():
            keep_metrics_until(before, records, num_steps)


def validation_batches(dataset_val: ChatDataset | None, batch_size: int) -> list[Batch]:
    if dataset_val is None:
        return []
    plan = BatchPlan(batch_size, 1, shuffle=False, seed=0)
    return [collate([dataset_val[row] for row in rows]) for [rows] in plan.steps(dataset_val.lengths, epoch=0)]


if __name__ == "__main__":
    run_recipe(recipe_main)
