"""Fine-tune a Llama-architecture model on one device with LoRA or QLoRA.

tune run recipes/lora_single_device.py --config configs/llama2_7b_qlora.yaml lora_rank=32
"""

import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from custom_components import schedules
from custom_components.adapters import PromptFormat, base_model_name, check_adapter_was_trained, save_adapter
from custom_components.batching import Batch, collate, optimizer_steps, row_order
from custom_components.builders import final_hidden_states
from custom_components.checkpoint_loading import fit_tokenizer, load_base_weights, unquantized_modules
from custom_components.components import instantiate
from custom_components.config import load_settings, write_yaml
from custom_components.datasets import ChatDataset
from custom_components.errors import UserError, run_recipe
from custom_components.generation import Sampling, answer_messages
from custom_components.loss import LinearCrossEntropy
from custom_components.memory import PeakMemory
from custom_components.metrics import MetricsFile, plot_losses
from custom_components.precision import resolved_device, resolved_dtype
from custom_components.run_directory import RunDirectory, prepare_run_directory
from custom_components.settings import TrainingSettings
from custom_components.transforms import Llama2ChatTransform


def recipe_main() -> None:
    start_seconds = time.perf_counter()
    settings = load_settings(TrainingSettings, sys.argv[1:])
    device = resolved_device(settings.device)
    dtype, dtype_words = resolved_dtype(settings.dtype, device)
    memory = PeakMemory(device)
    torch.manual_seed(settings.seed)

    with torch.device("meta"):
        model = instantiate(settings.model)
    tokenizer = instantiate(settings.tokenizer)
    fit_tokenizer(tokenizer, model)
    dataset = instantiate(settings.dataset, tokenizer=tokenizer)
    print(dataset.summary)

    run_directory = prepare_run_directory(settings.output_dir, settings.overwrite_output_dir)
    write_yaml(settings, run_directory.config)
    load_base_weights(model, settings.checkpoint_dir, dtype, device)
    describe(model, settings, device, dtype_words)
    answers_before = answer_sample_prompts(model, tokenizer, settings.sample_prompts, dtype)

    adapter_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = instantiate(settings.optimizer, adapter_parameters)
    totals = train(model, dataset, optimizer, settings, run_directory, device, memory)

    check_adapter_was_trained(model)
    prompt_format = PromptFormat("llama2", tokenizer.system_prompt, ["</s>"])
    save_adapter(model, run_directory.adapter, base_model_name(settings.checkpoint_dir), prompt_format)
    plot_losses(run_directory.metrics, run_directory.plot)
    answers_after = answer_sample_prompts(model, tokenizer, settings.sample_prompts, dtype)
    show_answers(settings.sample_prompts, answers_before, answers_after)
    print(closing_summary(totals, time.perf_counter() - start_seconds, memory, run_directory))


def train(
    model: TransformerDecoder,
    dataset: ChatDataset,
    optimizer: Optimizer,
    settings: TrainingSettings,
    run_directory: RunDirectory,
    device: torch.device,
    memory: PeakMemory,
) -> dict[str, float]:
    """Train the adapters of `model` in place; returns steps, tokens and seconds."""
    num_forwards = math.ceil(len(dataset) / settings.batch_size)
    num_steps_per_epoch = math.ceil(num_forwards / settings.gradient_accumulation_steps)
    num_steps_per_epoch = min(num_steps_per_epoch, settings.max_steps_per_epoch or num_steps_per_epoch)
    num_steps = settings.epochs * num_steps_per_epoch
    num_warmup_steps = schedules.num_warmup_steps(settings.warmup_steps, settings.warmup_ratio, num_steps)
    peak_rates = [group["lr"] for group in optimizer.param_groups]
    loss_function = instantiate(settings.loss)
    metrics = MetricsFile(run_directory.metrics)
    metric_logger = instantiate(settings.metric_logger) if settings.metric_logger else None
    totals = {"steps": 0, "tokens": 0, "seconds": 0.0}

    model.train()
    progress = tqdm(total=num_steps, unit="step", desc="training", dynamic_ncols=True)
    for epoch in range(settings.epochs):
        order = row_order(len(dataset), settings.seed, epoch, settings.shuffle)
        steps = optimizer_steps(order, settings.batch_size, settings.gradient_accumulation_steps)
        for step, forwards in zip(range(epoch * num_steps_per_epoch + 1, (epoch + 1) * num_steps_per_epoch + 1), steps):  # noqa: B905 - max_steps_per_epoch may end an epoch early
            step_start_seconds = time.perf_counter()
            batches = [collate([dataset[index] for index in rows]) for rows in forwards]
            rate_factor = scheduled_rate(settings.lr_scheduler, step, num_steps, num_warmup_steps)
            for group, peak_rate in zip(optimizer.param_groups, peak_rates, strict=True):
                group["lr"] = peak_rate * rate_factor

            loss = accumulate_gradients(model, batches, loss_function, settings.enable_activation_checkpointing, device)
            grad_norm = torch.nn.utils.clip_grad_norm_(
                [parameter for group in optimizer.param_groups for parameter in group["params"]],
                settings.clip_grad_norm or math.inf,
            )
            stop_if_not_finite(loss, grad_norm, step, forwards)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            step_seconds = time.perf_counter() - step_start_seconds
            num_tokens = sum(batch.num_tokens for batch in batches)
            record = {
                "step": step,
                "epoch": epoch,
                "loss": loss.item(),
                "lr": optimizer.param_groups[0]["lr"],
                "grad_norm": grad_norm.item(),
                "tokens": num_tokens,
                "supervised_tokens": sum(batch.num_supervised_tokens for batch in batches),
                "step_seconds": step_seconds,
                "tokens_per_second": num_tokens / step_seconds,
                "peak_memory_gib": memory.gib(),
            }
            metrics.write(record)
            if metric_logger is not None and step % settings.log_every_n_steps == 0:
                metric_logger.log_dict({key: value for key, value in record.items() if value is not None}, step=step)
            totals = {
                "steps": step,
                "tokens": totals["tokens"] + num_tokens,
                "seconds": totals["seconds"] + step_seconds,
            }
            progress.update()
            progress.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
    progress.close()
    metrics.close()
    if metric_logger is not None:
        metric_logger.close()
    return totals


def accumulate_gradients(
    model: TransformerDecoder,
    batches: Sequence[Batch],
    loss_function: LinearCrossEntropy,
    recompute_layers: bool,
    device: torch.device,
) -> Tensor:
    """Forward and backward over the batches of one optimizer step; returns the loss per supervised token.

    The sum over all batches is divided by the supervised tokens of all of them, so that N forwards of 1 row and 1 of N
    rows are the same step. It is divided before the backward, so that fp16 gradients do not overflow.
    """
    num_supervised_tokens = sum(batch.num_supervised_tokens for batch in batches)
    total = torch.zeros((), device=device)
    for batch in batches:
        batch = batch.to(device)
        hidden_1TD = final_hidden_states(
            model, batch.tokens_1T, batch.rows, batch.positions_1T, recompute_layers=recompute_layers
        )
        loss = loss_function(hidden_1TD, model.output, batch.labels_1T) / num_supervised_tokens
        loss.backward()
        total += loss.detach()
    return total


def scheduled_rate(lr_scheduler: dict[str, Any], step: int, num_steps: int, num_warmup_steps: int) -> float:
    """The factor of the peak learning rate at a step."""
    return instantiate(lr_scheduler, step=step, num_steps=num_steps, num_warmup_steps=num_warmup_steps)


def stop_if_not_finite(loss: Tensor, grad_norm: Tensor, step: int, forwards: list[list[int]]) -> None:
    if not (loss.isfinite() and grad_norm.isfinite()):
        raise UserError(
            f"step {step}: loss {loss.item()}, gradient norm {grad_norm.item()}; the rows of the step are {forwards}, "
            "counted from 0. Look at them, or lower optimizer.lr"
        )


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


def closing_summary(totals: dict[str, float], seconds: float, memory: PeakMemory, run_directory: RunDirectory) -> str:
    peak_gib = memory.gib()
    return (
        f"\n{totals['steps']} steps, {totals['tokens']} tokens in {totals['seconds']:.1f} s of training "
        f"({totals['tokens'] / totals['seconds']:.0f} tokens/s), {seconds:.1f} s in all"
        + (f", peak memory {peak_gib:.2f} GiB" if peak_gib is not None else "")
        + f"\nadapter {run_directory.adapter}\nplot    {run_directory.plot}\nmetrics {run_directory.metrics}"
    )


if __name__ == "__main__":
    run_recipe(recipe_main)
