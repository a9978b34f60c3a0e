"""Show the first rows of a training config as they will be trained: text, ids, labels, lengths. Trains nothing.

tune run recipes/preview.py --config configs/llama2_7b_qlora.yaml row=17
"""

import sys

import torch

from custom_components.config.components import instantiate
from custom_components.config.reading import load_settings
from custom_components.config.training_settings import PreviewSettings
from custom_components.datasets.row_preview import label_table, length_histogram, rendered_row
from custom_components.datasets.summary import account
from custom_components.datasets.tokenized_rows import ChatDataset, split_validation
from custom_components.runtime.errors import UserError, run_recipe
from custom_components.training.plan import long_warmup, plan_of
from custom_components.transforms.llama2_chat import Llama2ChatTransform, fit_tokenizer


def recipe_main() -> None:
    settings = load_settings(PreviewSettings, sys.argv[1:])
    tokenizer = instantiate(settings.tokenizer)
    if settings.checkpoint_dir.is_dir():
        with torch.device("meta"):
            tokenizer = fit_tokenizer(tokenizer, instantiate(settings.model))
    dataset = instantiate(settings.dataset, tokenizer=tokenizer)
    if settings.val_fraction is not None:
        dataset, dataset_val = split_validation(dataset, settings.val_fraction, settings.seed)
        print(f"{len(dataset_val)} rows are kept for validation")

    show_rows(dataset, tokenizer, settings)
    print(account(dataset.summaries))
    print(f"\nrows by tokens\n{length_histogram(dataset.lengths)}\n")
    show_plan(dataset, tokenizer, settings)


def show_rows(dataset: ChatDataset, tokenizer: Llama2ChatTransform, settings: PreviewSettings) -> None:
    """Print the first rows as text, or a single one with its table of ids and labels."""
    if settings.row is not None and settings.row >= len(dataset):
        raise UserError(f"row: {settings.row} is not there, the data set has the rows 0 to {len(dataset) - 1}")
    indices = range(min(settings.num_rows, len(dataset))) if settings.row is None else [settings.row]
    for index in indices:
        row = dataset[index]
        num_supervised = sum(label >= 0 for label in row["labels"])
        print(f"---- row {index}: {len(row['tokens'])} tokens, {num_supervised} supervised")
        print(rendered_row(row, tokenizer, colour=sys.stdout.isatty()))
        if settings.row is not None:
            print(label_table(row, tokenizer))
    print("----")


def show_plan(dataset: ChatDataset, tokenizer: Llama2ChatTransform, settings: PreviewSettings) -> None:
    """Print the optimizer steps that the run would take, and how full they are."""
    lengths = dataset.lengths
    plan = plan_of(settings, lengths, tokenizer.max_seq_len, has_validation=False)
    forward_sizes = [sum(lengths[row] for row in rows) for step in plan.steps for rows in step.forwards]
    print(
        f"{len(plan.steps)} optimizer steps, {plan.num_warmup_steps} of them warm-up; {len(forward_sizes)} forwards of "
        f"{min(forward_sizes)} to {max(forward_sizes)} tokens, {sum(forward_sizes) // len(forward_sizes)} on average"
    )
    if words := long_warmup(plan, settings.optimizer["lr"]):
        print(words)


if __name__ == "__main__":
    run_recipe(recipe_main)
