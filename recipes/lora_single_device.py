"""Fine-tune a Llama-architecture model on one device with LoRA or QLoRA.

tune run recipes/lora_single_device.py --config configs/llama2_7b_qlora.yaml lora_rank=32
"""

import math
import sys
import time

import torch
from torch import Tensor
from torch.optim import Optimizer
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from custom_components import schedules
from custom_components.adapters import PromptFormat, base_model_name, check_adapter_was_trained, save_adapter
from custom_components.batching import Batch, BatchPlan, collate
from custom_components.checkpoint_loading import fit_tokenizer, load_base_weights, unquantized_modules
from custom_components.components import instantiate
from custom_components.config import load_settings, write_yaml
from custom_components.datasets import ChatDataset, split_validation
from custom_components.errors import run_recipe
from custom_components.generation import Sampling, answer_messages
from custom_components.gradients import accumulate_gradients, stop_if_not_finite, validation_loss
from custom_components.memory import PeakMemory
from custom_components.metrics import MetricsFile, plot_losses
from custom_components.precision import resolved_device, resolved_dtype
from custom_components.run_directory import RunDirectory, prepare_run_directory
from custom_components.settings import TrainingSettings
from custom_components.training_state import Progress
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
    dataset, dataset_val = training_and_validation(settings, tokenizer)
    print("\n".join(map(str, dataset.summaries)))

    run_directory = prepare_run_directory(settings.output_dir, settings.overwrite_output_dir)
    write_yaml(settings, run_directory.config)
    load_base_weights(model, settings.checkpoint_dir, dtype, device)
    describe(model, settings, device, dtype_words)
    answers_before = answer_sample_prompts(model, tokenizer, settings.sample_prompts, dtype)

    progress = train(model, dataset, dataset_val, tokenizer, settings, run_directory, device, memory)

    check_adapter_was_trained(model)
    prompt_format = PromptFormat(settings.prompt_template, tokenizer.system_prompt, ["</s>"])
    save_adapter(model, run_directory.adapter, base_model_name(settings.checkpoint_dir), prompt_format)
    plot_losses(run_directory.metrics, run_directory.plot)
    answers_after = answer_sample_prompts(model, tokenizer, settings.sample_prompts, dtype)
    show_answers(settings.sample_prompts, answers_before, answers_after)
    print(closing_summary(progress, time.perf_counter() - start_seconds, memory, run_directory))


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
    dataset: ChatDataset,
    dataset_val: ChatDataset | None,
    tokenizer: Llama2ChatTransform,
    settings: TrainingSettings,
    run_directory: RunDirectory,
    device: torch.device,
    memory: PeakMemory,
) -> Progress:
    """Train the adapters of `model` in place, up to the best validation or else the last step."""
    plan = BatchPlan.of(settings, tokenizer.max_seq_len)
    steps = [(epoch, forwards) for epoch in range(settings.epochs) for forwards in plan.steps(dataset.lengths, epoch)]
    batches_val = validation_batches(dataset_val, settings.batch_size)
    num_warmup_steps = schedules.num_warmup_steps(settings.warmup_steps, settings.warmup_ratio, len(steps))
    optimizer = instantiate(settings.optimizer, [p for p in model.parameters() if p.requires_grad])
    peak_rates = [group["lr"] for group in optimizer.param_groups]
    loss_function = instantiate(settings.loss)
    metrics = MetricsFile(run_directory.metrics)
    metric_logger = instantiate(settings.metric_logger) if settings.metric_logger else None
    progress = Progress()
    best_adapter: dict[str, Tensor] = {}

    model.train()
    bar = tqdm(total=len(steps), unit="step", desc="training", dynamic_ncols=True)
    for step, (epoch, forwards) in enumerate(steps, 1):
        step_start_seconds = time.perf_counter()
        torch.manual_seed(settings.seed * 2**20 + step)  # dropout is a function of the step
        batches = [collate([dataset[row] for row in rows]) for rows in forwards]
        rate_factor = instantiate(
            settings.lr_scheduler, step=step, num_steps=len(steps), num_warmup_steps=num_warmup_steps
        )
        for group, peak_rate in zip(optimizer.param_groups, peak_rates, strict=True):
            group["lr"] = peak_rate * rate_factor

        recompute_layers = settings.enable_activation_checkpointing
        loss = accumulate_gradients(model, batches, loss_function, recompute_layers=recompute_layers, device=device)
        grad_norm = clip_gradients(optimizer, settings.clip_grad_norm)
        stop_if_not_finite(loss, grad_norm, step, forwards)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        progress.add_step(sum(batch.num_tokens for batch in batches), time.perf_counter() - step_start_seconds)
        record = {
            "step": step,
            "epoch": epoch,
            "loss": loss.item(),
            "lr": optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm.item(),
            "tokens": progress.last_num_tokens,
            "supervised_tokens": sum(batch.num_supervised_tokens for batch in batches),
            "step_seconds": progress.last_seconds,
            "tokens_per_second": progress.last_num_tokens / progress.last_seconds,
            "peak_memory_gib": memory.gib(),
        }
        metrics.write(record)
        if metric_logger is not None and step % settings.log_every_n_steps == 0:
            metric_logger.log_dict({key: value for key, value in record.items() if value is not None}, step=step)
        bar.update()
        bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)

        is_epoch_end = step == len(steps) or steps[step][0] != epoch
        if batches_val and (is_epoch_end or step % (settings.run_val_every_n_steps or len(steps)) == 0):
            val_loss = validation_loss(model, batches_val, loss_function, device)
            metrics.write({"step": step, "val_loss": val_loss, "val_perplexity": math.exp(val_loss)})
            if progress.add_validation(step, val_loss):
                best_adapter = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    bar.close()
    metrics.close()
    if metric_logger is not None:
        metric_logger.close()
    model.load_state_dict(best_adapter, strict=False)
    return progress


def validation_batches(dataset_val: ChatDataset | None, batch_size: int) -> list[Batch]:
    if dataset_val is None:
        return []
    plan = BatchPlan(batch_size, 1, shuffle=False, seed=0)
    return [collate([dataset_val[row] for row in rows]) for [rows] in plan.steps(dataset_val.lengths, epoch=0)]


def clip_gradients(optimizer: Optimizer, clip_grad_norm: float | None) -> Tensor:
    """Shorten the gradient of all parameters to `clip_grad_norm`; returns its norm before."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return torch.nn.utils.clip_grad_norm_(parameters, math.inf if clip_grad_norm is None else clip_grad_norm)


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


def closing_summary(progress: Progress, seconds: float, memory: PeakMemory, run_directory: RunDirectory) -> str:
    peak_gib = memory.gib()
    which = "the last step's"
    if progress.best_step is not None:
        which = f"step {progress.best_step}'s, the best by validation loss ({progress.best_val_loss:.4f})"
    return (
        f"\n{progress.num_steps} steps, {progress.num_tokens} tokens in {progress.seconds:.1f} s of training "
        f"({progress.num_tokens / progress.seconds:.0f} tokens/s), {seconds:.1f} s in all"
        + (f", peak memory {peak_gib:.2f} GiB" if peak_gib is not None else "")
        + f"\nadapter {run_directory.adapter}, {which}"
        + f"\nplot    {run_directory.plot}\nmetrics {run_directory.metrics}"
    )


if __name__ == "__main__":
    run_recipe(recipe_main)
