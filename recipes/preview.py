"""Show the first rows of a training config as they will be trained: text, ids, labels, lengths. Trains nothing.

tune run recipes/preview.py --config configs/llama2_7b_qlora.yaml row=17
"""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from custom_components.config.components import component, instantiate
from custom_components.config.preference_settings import PreferenceSettings
from custom_components.config.reading import load_settings
from custom_components.config.training_kinds import PreviewSettings
from custom_components.datasets.chat import chat_dataset, chat_readers
from custom_components.datasets.preference import preference_dataset, preference_readers
from custom_components.datasets.preview_page import PreviewPage, page_file
from custom_components.datasets.preview_text import marks_of_stdout, row_text
from custom_components.datasets.row_preview import ShownRow, length_histogram, rows_of_dataset, rows_of_files
from custom_components.datasets.source_reader import SourceReader
from custom_components.datasets.summary import counted
from custom_components.datasets.training_data import Data, PairData, RowsOfRun
from custom_components.recipe_parts.opening import model_without_weights, open_rows_as
from custom_components.runtime.errors import UserError, run_recipe
from custom_components.runtime.paths import is_or_holds
from custom_components.runtime.terminal import say
from custom_components.training.plan import long_warmup, plan_of
from custom_components.transforms.chat_transform import ChatTransform
from custom_components.transforms.tokenizer_fitting import fit_tokenizer
from custom_components.weights.checkpoint_files import open_checkpoint

# What reads the rows of our data sets, to look at them one by one.
_READERS: Mapping[Any, Callable[..., Sequence[SourceReader]]] = {
    chat_dataset: chat_readers,
    preference_dataset: preference_readers,
}


def recipe_main() -> None:
    settings = load_settings(PreviewSettings, sys.argv[1:])
    with page_file(settings.output_file) as page:
        tokenizer = fitted_tokenizer(settings)
        try:
            kind = PairData if isinstance(settings, PreferenceSettings) else Data
            data: RowsOfRun = open_rows_as(kind, settings, tokenizer)
        except UserError:  # the rows are shown nevertheless, as far as they can be read
            show_rows(rows_to_train_on(settings, tokenizer, None), page)
            raise
        show_rows(rows_to_train_on(settings, tokenizer, data), page)
        if settings.row is None:
            show_rows(rows_to_validate_on(settings, tokenizer, data), page)
        print("----")
        say(data.account)
        print(f"\nrows by tokens\n{length_histogram(data.train.lengths)}\n")
        say(planned := plan_words(settings, data))
        page.add_text("What becomes of the rows", data.account)
        page.add_text("Rows by tokens", length_histogram(data.train.lengths), is_drawing=True)
        page.add_text("The run", planned)
    if settings.output_file is not None:
        say(f"page {settings.output_file}")


def fitted_tokenizer(settings: PreviewSettings) -> ChatTransform:
    """Make the tokenizer, held against the model if its checkpoint is here already."""
    # The checkpoint may be not there yet, if the tokenizer is elsewhere.
    if settings.checkpoint_dir.exists() or is_or_holds(settings.checkpoint_dir, settings.tokenizer.get("path", "")):
        open_checkpoint(settings.checkpoint_dir)
    # What the adapter learns with is what validation and generation use.
    tokenizer = instantiate(settings.tokenizer).with_system_prompt(settings.dataset.get("system_prompt"))
    if not settings.checkpoint_dir.is_dir():
        return tokenizer
    return fit_tokenizer(tokenizer, model_without_weights(settings, tokenizer))


def rows_to_train_on(settings: PreviewSettings, tokenizer: ChatTransform, data: RowsOfRun | None) -> Iterator[ShownRow]:
    """Show the first rows of the training files, or a single one; without `data`, which cannot be read as a whole."""
    wanted = range(settings.num_rows) if settings.row is None else range(settings.row, settings.row + 1)
    held_out: Collection[bytes] = ()
    if data is not None and data.validation is not None and settings.val_fraction is not None:
        held_out = {data.validation.content_digest(index) for index in range(len(data.validation))}
    with_tokens = settings.row is not None
    if is_ours(settings.dataset):
        readers = readers_of(settings.dataset, tokenizer)
        yield from rows_of_files(readers, wanted, with_tokens=with_tokens, held_out=held_out)
    elif data is not None:
        yield from rows_of_dataset(data.train, tokenizer, wanted, with_tokens=with_tokens)


def rows_to_validate_on(settings: PreviewSettings, tokenizer: ChatTransform, data: RowsOfRun) -> Iterator[ShownRow]:
    """Show the first rows of `dataset_val`, if there is one."""
    wanted = range(settings.num_rows)
    if settings.dataset_val is None or data.validation is None:
        return
    if is_ours(settings.dataset_val):
        readers = readers_of(settings.dataset_val, tokenizer)
        yield from rows_of_files(readers, wanted, with_tokens=False, kind="validation row")
    else:
        yield from rows_of_dataset(data.validation, tokenizer, wanted, with_tokens=False, kind="validation row")


def is_ours(node: Mapping[str, Any]) -> bool:
    """Tell whether a data set is read from files by one of our components, and not by one of the user's own."""
    return component(node["_component_"]) in _READERS


def readers_of(node: Mapping[str, Any], tokenizer: ChatTransform) -> Sequence[SourceReader]:
    """Find the sources of a node that :func:`is_ours`."""
    readers = _READERS[component(node["_component_"])]
    return readers(tokenizer, **{key: value for key, value in node.items() if key != "_component_"})


def show_rows(rows: Iterable[ShownRow], page: PreviewPage) -> None:
    marks = marks_of_stdout()
    for row in rows:
        print(row_text(row, marks))
        page.add_row(row)


def plan_words(settings: PreviewSettings, data: RowsOfRun) -> str:
    """Describe the optimizer steps that the run would take, and how full they are."""
    lengths = data.train.lengths
    is_auto = settings.batch_size == "auto"  # gradient_accumulation_steps then counts the rows of a step
    settings = settings.model_copy(update={"batch_size": 1}) if is_auto else settings
    plan = plan_of(settings, lengths, data.pack_capacity_tokens, has_validation=False)
    forward_sizes = [sum(lengths[row] for row in rows) for step in plan.steps for rows in step.forwards]
    forwards = (
        f"{len(forward_sizes)} forwards of {min(forward_sizes)} to {max(forward_sizes)} tokens, "
        f"{sum(forward_sizes) // len(forward_sizes)} on average"
    )
    steps = (
        f"{counted(len(plan.steps), 'optimizer step')}, {plan.num_warmup_steps} of them warm-up; "
        f"{'as many rows a forward as fit' if is_auto else forwards}"
    )
    warning = long_warmup(plan, settings.optimizer["lr"])
    return f"{steps}\n{warning}" if warning else steps


if __name__ == "__main__":
    run_recipe(recipe_main)
