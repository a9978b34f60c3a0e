"""Fine-tune a Llama-architecture model on one device with LoRA or QLoRA.

tune run recipes/lora_single_device.py --config configs/llama2_7b_qlora.yaml lora_rank=32
"""

import math
import sys
import time
from pathlib import Path

import torch
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from custom_components import schedules
from custom_components.adapters import (
    PromptFormat,
    base_model_name,
    check_adapter_fits,
    check_adapter_was_trained,
    copy_into_adapter,
    save_adapter,
)
from custom_components.batching import Batch, BatchPlan, collate
from custom_components.checkpoint_loading import (
    check_checkpoint,
    fit_tokenizer,
    frozen_checksum,
    load_base_weights,
    unquantized_modules,
)
from custom_components.components import instantiate
from custom_components.config import load_settings, write_yaml
from custom_components.errors import run_recipe
from custom_components.generation import Sampling, answer_messages
from custom_components.gradients import accumulate_gradients, clip_gradients, update_adapters, validation_loss
from custom_components.lora import adapter_parameter_groups
from custom_components.memory import PeakMemory
from custom_components.metrics import MetricsFile, keep_metrics_until, plot_losses
from custom_components.out_of_memory import StepMemory
from custom_components.precision import refuse_paged_optimizer_on_cpu, resolved_device, resolved_dtype
from custom_components.run_directory import RunDirectory, run_directory
from custom_components.settings import TrainingSettings
from custom_components.stopping import stop_requests
from custom_components.tokenized_rows import ChatDataset, split_validation
from custom_components.training_state import (
    Progress,
    TrainingState,
    check_resumed_config,
    delete_checkpoints_after,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from custom_components.transforms import Llama2ChatTransform


def recipe_main() -> None:
    start_seconds = time.perf_counter()
    settings = load_settings(TrainingSettings, sys.argv[1:])
    device = resolved_device(settings.device)
    dtype, dtype_words = resolved_dtype(settings.dtype, device)
    refuse_paged_optimizer_on_cpu(settings.optimizer["_component_"], device)
    memory = PeakMemory(device)
    torch.manual_seed(settings.seed)

    with torch.device("meta"):
        model = instantiate(settings.model)
    tokenizer = instantiate(settings.tokenizer)
    fit_tokenizer(tokenizer, model)
    dataset, dataset_val = training_and_validation(settings, tokenizer)
    print("\n".join(map(str, dataset.summaries)))

    resumed_from = find_checkpoint(settings.resume_from_checkpoint, settings.output_dir)
    if resumed_from is not None:
        check_resumed_config(resumed_from, settings)
    check_checkpoint(model, settings.checkpoint_dir)
    init_adapter = None
    if settings.init_adapter_from is not None and resumed_from is None:
        init_adapter = check_adapter_fits(model, settings.init_adapter_from)

    resumes_here = resumed_from is not None and resumed_from.resolve().is_relative_to(settings.output_dir.resolve())
    with run_directory(settings.output_dir, overwrite=settings.overwrite_output_dir, resumes=resumes_here) as directory:
        load_base_weights(model, settings.checkpoint_dir, dtype, device)
        if init_adapter is not None:
            copy_into_adapter(model, init_adapter)
        describe(model, settings, device, dtype_words)
        answers_before = answer_sample_prompts(model, tokenizer, settings.sample_prompts, dtype)
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
        write_yaml(settings, directory.config)
        prompt_format = PromptFormat(settings.prompt_template, tokenizer.system_prompt, ["</s>"])
        train(model, state, dataset, dataset_val, tokenizer, settings, directory, prompt_format, device, memory)

        if base_checksum is not None and frozen_checksum(model) != base_checksum:
            raise AssertionError("verify_base: the frozen base has changed")
        model.load_state_dict(state.best_adapter, strict=False)
        check_adapter_was_trained(model)
        save_adapter(model, directory.adapter, base_model_name(settings.checkpoint_dir), prompt_format)
        plot_losses(directory.metrics, directory.plot)
        answers_after = answer_sample_prompts(model, tokenizer, settings.sample_prompts, dtype)
        show_answers(settings.sample_prompts, answers_before, answers_after)
        print(closing_summary(state.progress, time.perf_counter() - start_seconds, memory, directory))


def training_and_validation(
    settings: TrainingSettings, tokenizer: Llama2ChatTransform
) -> tuple[ChatDataset, ChatDataset | None]:
    """The rows to train on, and those to validate on, if any."""
    dataset = instantiate(settings.dataset, tokenizer=tokenizer)
    # The data set's own system prompt is what the adapter learns with: validation and generation are to use it too.
    tokenizer.system_prompt = settings.dataset.get("system_prompt") or tokenizer.system_prompt
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
    directory: RunDirectory,
    prompt_format: PromptFormat,
    device: torch.device,
    memory: PeakMemory,
) -> None:
    """Train the adapters of `model` and keep `state`, in place, from the state's step to the last or until stopped."""
    plan = BatchPlan.of(settings, tokenizer.max_seq_len)
    steps = [(epoch, forwards) for epoch in range(settings.epochs) for forwards in plan.steps(dataset.lengths, epoch)]
    batches_val = validation_batches(dataset_val, settings.batch_size)
    num_warmup_steps = schedules.num_warmup_steps(settings.warmup_steps, settings.warmup_ratio, len(steps))
    groups = adapter_parameter_groups(model, settings.optimizer["lr"], settings.lora_plus_ratio)
    peak_rates = [group["lr"] for group in groups]
    loss_function = instantiate(settings.loss)
    metrics = MetricsFile(directory.metrics)
    metric_logger = instantiate(settings.metric_logger) if settings.metric_logger else None
    base_model = base_model_name(settings.checkpoint_dir)
    step_memory = StepMemory(device)
    progress = state.progress

    model.train()
    bar = tqdm(total=len(steps), initial=progress.num_steps, unit="step", desc="training", dynamic_ncols=True)
    with stop_requests() as stop_request:
        remaining = [] if progress.stops_early(settings.early_stopping_patience) else steps[progress.num_steps :]
        for step, (epoch, forwards) in enumerate(remaining, progress.num_steps + 1):
            step_start_seconds = time.perf_counter()
            torch.manual_seed(settings.seed * 2**20 + step)  # dropout is a function of the step
            batches = [collate([dataset[row] for row in rows]) for rows in forwards]
            rate_factor = instantiate(
                settings.lr_scheduler, step=step, num_steps=len(steps), num_warmup_steps=num_warmup_steps
            )
            for group, peak_rate in zip(state.optimizer.param_groups, peak_rates, strict=True):
                group["lr"] = peak_rate * rate_factor

            largest_forward_tokens = max(batch.num_tokens for batch in batches)
            try:
                loss = accumulate_gradients(
                    model,
                    batches,
                    loss_function,
                    state.scaler,
                    recompute_layers=settings.enable_activation_checkpointing,
                    neftune_noise_alpha=settings.neftune_noise_alpha,
                    device=device,
                )
            except torch.OutOfMemoryError:
                raise step_memory.error(step, largest_forward_tokens, settings.batch_size) from None
            step_memory.add_step(largest_forward_tokens)
            grad_norm = clip_gradients(state.optimizer, state.scaler, settings.clip_grad_norm)
            is_skipped = update_adapters(state.optimizer, state.scaler, loss, grad_norm, step, forwards)

            num_tokens, seconds = sum(batch.num_tokens for batch in batches), time.perf_counter() - step_start_seconds
            progress.add_step(num_tokens, seconds, is_skipped)
            record = {
                "step": step,
                "epoch": epoch,
                "loss": loss.item(),
                "lr": state.optimizer.param_groups[0]["lr"],
                "grad_norm": grad_norm.item(),
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

            is_epoch_end = step == len(steps) or steps[step][0] != epoch
            if batches_val and (is_epoch_end or is_due(step, settings.run_val_every_n_steps)):
                val_loss = validation_loss(model, batches_val, loss_function, device)
                metrics.write({"step": step, "val_loss": val_loss, "val_perplexity": math.exp(val_loss)})
                if progress.add_validation(val_loss):
                    state.keep_best(model)
                if settings.sample_prompts:
                    write_samples(directory.samples, step, model, tokenizer, settings.sample_prompts)
            stops_early = progress.stops_early(settings.early_stopping_patience)
            is_last = step == len(steps) or stops_early or stop_request.signal_number is not None
            saves_after_epoch = settings.save_every_n_steps is None and is_epoch_end
            if is_last or saves_after_epoch or is_due(step, settings.save_every_n_steps):
                save_checkpoint(directory.path, model, state, settings, base_model, prompt_format)
            stop_request.leave_if_asked()
            if stops_early:
                bar.write(f"stopped early: {progress.num_validations_since_best} validations without a better loss")
                break
    bar.close()
    metrics.close()
    if metric_logger is not None:
        metric_logger.close()


def write_samples(
    path: Path, step: int, model: TransformerDecoder, tokenizer: Llama2ChatTransform, prompts: list[str]
) -> None:
    """Append the model's answers to the sample prompts, one JSON object a line."""
    answers = answer_sample_prompts(model, tokenizer, prompts, model.tok_embeddings.weight.dtype)
    samples = MetricsFile(path)
    for prompt, answer in zip(prompts, answers, strict=True):
        samples.write({"step": step, "prompt": prompt, "answer": answer})
    samples.close()


def go_on_in(directory: RunDirectory, checkpoint: Path, num_steps: int) -> None:
    """Bring a run's records to where its checkpoint stands; those of a run elsewhere are copied."""
    print(f"going on from {checkpoint}")
    delete_checkpoints_after(directory.path, num_steps)
    run_before = RunDirectory(checkpoint.parent.parent)
    for before, records in ((run_before.metrics, directory.metrics), (run_before.samples, directory.samples)):
        if before.exists():
            keep_metrics_until(before, records, num_steps)


def is_due(step: int, every_n_steps: int | None) -> bool:
    return every_n_steps is not None and step % every_n_steps == 0


def validation_batches(dataset_val: ChatDataset | None, batch_size: int) -> list[Batch]:
    if dataset_val is None:
        return []
    plan = BatchPlan(batch_size, 1, shuffle=False, seed=0)
    return [collate([dataset_val[row] for row in rows]) for [rows] in plan.steps(dataset_val.lengths, epoch=0)]


def answer_sample_prompts(
    model: TransformerDecoder, tokenizer: Llama2ChatTransform, prompts: list[str], dtype: torch.dtype
) -> list[str]:
    dialogs = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return answer_messages(model, tokenizer, dialogs, max_new_tokens=100, sampling=Sampling(), dtype=dtype)


def show_answers(prompts: list[str], answers_before: list[str], answers_after: list[str]) -> None:
    for prompt, before, after in zip(prompts, answers_before, answers_after, strict=True):
        print(f"\nprompt  {prompt}\nbefore  {before}\nafter   {after}")


def describe(model: TransformerDecoder, settings: TrainingSettings, device: torch.device, dtype_words: str) -> None:
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    base = "NF4" if settings.quantize_base else dtype_words.split(",")[0]
    print(f"device {device}, dtype {dtype_words}; {num_trained:,} trained parameters in fp32 over a base in {base}")
    if settings.quantize_base and (names := unquantized_modules(model)):
        print(f"not quantized, NF4 blocks do not divide them: {', '.join(names)}")


def closing_summary(progress: Progress, seconds: float, memory: PeakMemory, directory: RunDirectory) -> str:
    peak_gib = memory.gib()
    which = "the last step's"
    if progress.best_step is not None:
        which = f"step {progress.best_step}'s, the best by validation loss ({progress.best_val_loss:.4f})"
    return (
        f"\n{progress.num_steps} steps"
        + (f" ({progress.num_skipped_steps} skipped, fp16 overflowed)" if progress.num_skipped_steps else "")
        + f", {progress.num_tokens} tokens in {progress.seconds:.1f} s of training "
        f"({progress.num_tokens / progress.seconds:.0f} tokens/s), {seconds:.1f} s in all"
        + (f", peak memory {peak_gib:.2f} GiB" if peak_gib is not None else "")
        + f"\nadapter {directory.adapter}, {which}"
        + f"\nplot    {directory.plot}\nmetrics {directory.metrics}"
    )


if __name__ == "__main__":
    run_recipe(recipe_main)
