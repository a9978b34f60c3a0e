"""Sections of the model card of a run's result, an adapter or a model."""

import re
from collections.abc import Iterator
from pathlib import Path

from custom_components.datasets.source_files import is_on_hub
from custom_components.datasets.tokenized_rows import TokenizedRows
from custom_components.runs.metrics import read_metrics
from custom_components.training.state import Progress
from custom_components.transforms.dialogs import chat_messages
from custom_components.transforms.jinja_dialogs import JinjaTemplate
from custom_components.transforms.marked_template import MarkedTemplate
from custom_components.transforms.prompt_format import PromptFormat
from custom_components.transforms.templates import dialog_turns, prompt_template
from custom_components.transforms.turns import text_of
from custom_components.weights.card import TrainedSteps, local_path, markdown_link


def which_step(progress: Progress, steps: TrainedSteps) -> str:
    stopped = ""
    if not steps.is_finished:
        stopped = f"The run was stopped at step {steps.num_steps} of {steps.num_planned_steps}. "
    if progress.best_step is not None:
        best = f"step {progress.best_step} of {progress.num_steps}"
        return f"{stopped}It is the state after {best}, the best by validation loss."
    return f"{stopped}It is the state after the last of {progress.num_steps} steps."


def data_lines(train_on: str | None, dataset: TokenizedRows, dataset_val: TokenizedRows | None) -> Iterator[str]:
    """Say which rows were trained on.

    Args:
        train_on: what was supervised of them; None: they are pairs, whose answers were compared.
    """
    for summary in dataset.summaries:
        name = markdown_link(summary.source, "datasets/") if is_on_hub(summary.source) else local_path(summary.source)
        split = f", split {summary.split}" if summary.split != "train" else ""
        weight = f", weight {summary.weight:g}" if summary.num_taken is not None else ""
        dropped = f" of {summary.num_rows}" if summary.num_kept < summary.num_rows else ""
        truncated = f", {summary.num_truncated} of them cut to the longest length" if summary.num_truncated else ""
        yield f"{name}{split}{weight}: {summary.num_kept}{dropped} rows{truncated}"
    yield f"rows trained on: {len(dataset)}"
    if dataset_val is not None:
        yield f"rows validated on: {len(dataset_val)}"
    if train_on is None:
        yield "compared: the answers in which the two dialogs of a row differ"
        return
    yield {
        "assistant": "supervised: the answers",
        "last_assistant": "supervised: the last answer of each dialog",
        "all": "supervised: prompts and answers",
    }[train_on]


def prompt_format_section(prompt_format: PromptFormat) -> str:
    """Show a dialog of placeholders as it is tokenized, with `<s>` and `</s>` for BOS and EOS."""
    template, system_prompt = prompt_format.prompt_template, prompt_format.system_prompt
    system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
    exchange = [{"role": "user", "content": "{question}"}, {"role": "assistant", "content": "{answer}"}]
    written = prompt_template(template)
    if isinstance(written, JinjaTemplate):
        written = written.with_names("<s>", "</s>", prompt_format.stop_tokens)
    turns = dialog_turns(chat_messages([*system, *exchange, *exchange]), written)
    text = text_of(turns, "<s>", "</s>")
    ends = next((f"`{token}`" for token in prompt_format.stop_tokens if token in text), "`</s>`")
    name = f"`{template}`" if isinstance(template, str) else "One of its own"
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    names_tokens = isinstance(written, JinjaTemplate) or (isinstance(written, MarkedTemplate) and written.names_ends)
    stand_for = "stand for the tokenizer's BOS and EOS" if names_tokens else "are the tokenizer's control tokens"
    return (
        f"\n{name}. A dialog of two questions; `<s>` and `</s>` {stand_for}, and {ends} ends an "
        f"answer:\n\n{fence}text\n{text}\n{fence}\n"
    )


def loss_lines(progress: Progress, metrics: Path) -> Iterator[str]:
    steps = [record for record in read_metrics(metrics) if record.get("loss") is not None]
    num_tokens = sum(record["supervised_tokens"] for record in steps)
    mean = sum(record["loss"] * record["supervised_tokens"] for record in steps) / num_tokens
    yield f"training, last step: {steps[-1]['loss']:.4f}"
    yield f"training, mean over the tokens of all steps: {mean:.4f}"
    if progress.best_step is not None:
        yield f"validation, best, after step {progress.best_step}: {progress.best_val_loss:.4f}"


def pair_lines(progress: Progress, metrics: Path) -> Iterator[str]:
    records = read_metrics(metrics)
    steps = [record for record in records if record.get("loss") is not None]
    yield f"training, last step: {steps[-1]['loss']:.4f}"
    yield f"training, pairs right in the last step: {steps[-1]['reward_accuracy']:.1%}"
    validations = {record["step"]: record for record in records if "val_loss" in record}
    if progress.best_step in validations:
        best = validations[progress.best_step]
        yield f"validation, best, after step {progress.best_step}: {best['val_loss']:.4f}"
        yield f"validation, pairs right then: {best['val_reward_accuracy']:.1%}"
