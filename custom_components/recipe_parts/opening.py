"""The opening of a training recipe: all that is read, checked and chosen before the first step."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torchtune.modules import TransformerDecoder

from custom_components.config.components import instantiate
from custom_components.config.lora_settings import AdapterKeys
from custom_components.config.training_settings import TrainingSettings, refuse_cuda_only_settings
from custom_components.datasets.tokenized_rows import split_validation
from custom_components.datasets.training_data import Data, RowsOfRun
from custom_components.distributed.ranks import ALONE, Ranks
from custom_components.distributed.sharding import LayerShards
from custom_components.memory.fitting import Fit, fit_to_device
from custom_components.models.lora import adapter_modules
from custom_components.models.token_rows import train_token_rows
from custom_components.recipe_parts.step_choices import step_choices, step_parts, step_rows, with_forwards_of
from custom_components.runs.resuming import AUTO, ResumedRun, open_run_to_resume
from custom_components.runs.run_directory import RunDirectory, check_results, run_directory
from custom_components.runtime.devices import resolved_device, resolved_dtype
from custom_components.runtime.errors import UserError
from custom_components.runtime.host_allocator import keep_freed_memory
from custom_components.runtime.process_memory import PeakMemory
from custom_components.runtime.terminal import say
from custom_components.training.plan import plan_of
from custom_components.transforms.chat_transform import ChatTransform
from custom_components.transforms.prompt_format import PromptFormat
from custom_components.transforms.tokenizer_files import exported_tokenizer, template_of_format, tokenizer_texts
from custom_components.transforms.tokenizer_fitting import fit_tokenizer
from custom_components.weights.checkpoint_files import BaseCheckpoint, open_checkpoint
from custom_components.weights.checkpoint_loading import check_base_weights


class Rows(Protocol):
    """What a recipe trains on, as far as the opening looks at it."""

    @property
    def tokenizer(self) -> ChatTransform: ...

    @property
    def account(self) -> str:
        """What became of the rows of each source, in words."""

    @property
    def lengths(self) -> Sequence[int]:
        """The tokens of each row to train on."""

    @property
    def pack_capacity_tokens(self) -> int | None:
        """The tokens of a pack, where rows are packed."""

    @property
    def has_validation(self) -> bool:
        """Whether there are rows to validate on."""


SettingsType = TypeVar("SettingsType", bound=TrainingSettings)
RowsType = TypeVar("RowsType", bound=Rows)
SettingsType_co = TypeVar("SettingsType_co", bound=TrainingSettings, covariant=True)
RowsType_co = TypeVar("RowsType_co", bound=Rows, covariant=True)
RowsOfRunType = TypeVar("RowsOfRunType", bound=RowsOfRun)


@dataclass(frozen=True)
class Machine:
    """What a run computes on, and what it has taken so far.

    Attributes:
        dtype: of the computation.
        dtype_words: the dtype and why it is that.
        memory: measured since the start.
        start_seconds: `time.perf_counter()` at the start.
    """

    device: torch.device
    dtype: torch.dtype
    dtype_words: str
    memory: PeakMemory
    start_seconds: float


@dataclass(frozen=True)
class Opening(Generic[SettingsType_co, RowsType_co]):
    """What a training recipe has opened. Nothing is written and no weight is loaded yet.

    Attributes:
        settings: of the config; `batch_size: auto` is settled if the run is resumed.
        model: on the meta device.
        data: the rows.
        base: the checkpoint that is trained on.
        resumed: the run to go on with; None: a new one.
        overwrites: what an earlier run wrote in output_dir is to be replaced.
        fit: how a step is divided into forwards.
        ranks: the processes that train the model together.
        num_planned_ranks: as many as the run was begun with: a step has the forwards of all of them.
        shards: the shares of the base's layers that ranks keep; None: each has the whole base.
    """

    settings: SettingsType_co
    machine: Machine
    model: TransformerDecoder
    data: RowsType_co
    base: BaseCheckpoint
    resumed: ResumedRun | None
    overwrites: bool
    fit: Fit
    ranks: Ranks
    num_planned_ranks: int
    shards: LayerShards | None = None

    @property
    def adapter_texts(self) -> dict[str, str]:
        """The files beside an adapter's weights, content by name; with new tokens also those of the tokenizer."""
        tokenizer = self.data.tokenizer
        texts = self.prompt_format.texts()
        if not any(tokenizer.tokenizer.is_control(token) for token in tokenizer.trainable_ids):
            return texts
        exported = exported_tokenizer(tokenizer, template_of_format(tokenizer, self.prompt_format))
        return texts | tokenizer_texts(exported, self.base.shape.max_seq_len)

    @property
    def prompt_format(self) -> PromptFormat:
        """The format that the rows have."""
        tokenizer = self.data.tokenizer
        return PromptFormat(tokenizer.prompt_template, tokenizer.system_prompt, tokenizer.stop_pieces)


def open_training(
    settings: SettingsType, open_data: Callable[[SettingsType, ChatTransform], RowsType], ranks: Ranks = ALONE
) -> Opening[SettingsType, RowsType]:
    """Open all that a training config names, and check that it belongs together.

    A run that `resume_from_checkpoint: auto` finds finished is said to be, and the process ends.

    Args:
        open_data: opens the rows, given the tokenizer of the config.
        ranks: that open the same, this process among them.

    Raises:
        UserError: something is missing, damaged, or does not fit the rest.
    """
    machine = _machine_for(settings, ranks)
    base = open_checkpoint(settings.checkpoint_dir)
    tokenizer = instantiate(settings.tokenizer)
    model = model_without_weights(settings, tokenizer)
    data = open_data(settings, fit_tokenizer(tokenizer, model))
    say(data.account)
    resumed = open_run_to_resume(settings.resume_from_checkpoint, settings.output_dir)
    if resumed is not None:
        settings = resumed.checked_settings(settings)
    num_planned_ranks = ranks.num if resumed is None else resumed.num_ranks
    if resumed is not None:
        _leave_if_finished(settings, data, resumed, num_planned_ranks)
    check_base_weights(model, base)
    rows = step_rows(settings, data.lengths, data.pack_capacity_tokens)
    fit = fit_to_device(step_choices(settings), model, rows, step_parts(settings), machine.dtype, machine.device)
    overwrites = _overwrites(settings, resumed)
    return Opening(settings, machine, model, data, base, resumed, overwrites, fit, ranks, num_planned_ranks)


def model_without_weights(settings: TrainingSettings, tokenizer: ChatTransform) -> TransformerDecoder:
    """Build the model of a config on the meta device, with room for the tokens that are trained.

    Raises:
        UserError: the model has an adapter and the recipe trains none, or the reverse; tokens are to be trained beside
            an adapter, and there is none.
    """
    if tokenizer.trainable_ids and "trainable_tokens" not in type(settings).model_fields:
        raise UserError(
            "tokenizer.trainable_tokens: are rows beside an adapter, and here the model's own weights are trained; "
            "delete the key"
        )
    with torch.device("meta"):
        model = instantiate(settings.model)
    _check_adapters(settings, has_adapters=bool(adapter_modules(model)))
    if tokenizer.trainable_ids:
        train_token_rows(model, tokenizer.trainable_ids)
    return model


def _check_adapters(settings: TrainingSettings, *, has_adapters: bool) -> None:
    """Refuse a model of the user's own that is for another recipe; ours are known by their names."""
    trains_adapter = isinstance(settings, AdapterKeys)
    if has_adapters == trains_adapter:
        return
    other, kind = ("full", "without") if trains_adapter else ("lora", "with")
    raise UserError(
        f"model._component_: {settings.model['_component_']!r} builds a model {kind} adapters, which is for "
        f"recipes/{other}_single_device.py; use that, or another component"
    )


def open_rows(settings: TrainingSettings, tokenizer: ChatTransform) -> Data:
    """Open the rows of supervised fine-tuning: those to train on, and those to validate on, if any."""
    return open_rows_as(Data, settings, tokenizer)


def open_rows_as(data: type[RowsOfRunType], settings: TrainingSettings, tokenizer: ChatTransform) -> RowsOfRunType:
    """Open the rows that a config names, for `data` to lay out."""
    # What the model learns with is what validation and generation use.
    tokenizer = tokenizer.with_system_prompt(settings.dataset.get("system_prompt"))
    dataset = instantiate(settings.dataset, tokenizer=tokenizer)
    if settings.val_fraction is not None:
        return data(*split_validation(dataset, settings.val_fraction, settings.seed), tokenizer)
    if settings.dataset_val is not None:
        return data(dataset, instantiate(settings.dataset_val, tokenizer=tokenizer), tokenizer)
    return data(dataset, None, tokenizer)


@contextlib.contextmanager
def directory_of_run(opening: Opening) -> Iterator[RunDirectory]:
    """Hold the run's directory for the time of the block, see :func:`run_directory`.

    Of several ranks the first holds it, and the others write nothing there.
    """
    settings, resumed = opening.settings, opening.resumed
    if not opening.ranks.is_first:
        yield RunDirectory(settings.output_dir, settings.result_name)
        return
    resumes = resumed is not None and resumed.is_inside(settings.output_dir)
    with run_directory(
        settings.output_dir, overwrite=opening.overwrites, resumes=resumes, result_name=settings.result_name
    ) as directory:
        yield directory


def _machine_for(settings: TrainingSettings, ranks: Ranks) -> Machine:
    """Choose device and dtype, once nothing in output_dir and in the settings forbids the run."""
    start_seconds = time.perf_counter()
    resumes = settings.resume_from_checkpoint is not False
    check_results(
        settings.output_dir,
        overwrite=settings.overwrite_output_dir,
        resumes=resumes,
        result_name=settings.result_name,
    )
    device = resolved_device(ranks.device_name(settings.device))
    dtype, dtype_words = resolved_dtype(settings.dtype, device)
    refuse_cuda_only_settings(settings, device)
    memory = PeakMemory(device)
    keep_freed_memory()
    torch.manual_seed(settings.seed)
    return Machine(device, dtype, dtype_words, memory, start_seconds)


def _leave_if_finished(settings: TrainingSettings, data: Rows, resumed: ResumedRun, num_planned_ranks: int) -> None:
    """End the process if the run that `settings` describe, with `auto` for resuming, has its result."""
    if settings.resume_from_checkpoint != AUTO or not resumed.is_inside(settings.output_dir):
        return
    of_all = with_forwards_of(settings, num_planned_ranks)
    plan = plan_of(of_all, data.lengths, data.pack_capacity_tokens, has_validation=False)
    if resumed.is_finished(len(plan.steps), settings.early_stopping_patience):
        say(f"{settings.output_dir}: the run is finished, {resumed.progress.num_steps} steps; nothing is left to do")
        sys.exit(0)


def _overwrites(settings: TrainingSettings, resumed: ResumedRun | None) -> bool:
    if resumed is not None and resumed.is_inside(settings.output_dir):
        return False
    # With `auto`, a run that died before its first checkpoint begins again.
    begins_again = resumed is None and settings.resume_from_checkpoint == AUTO
    return settings.overwrite_output_dir or (
        begins_again and RunDirectory(settings.output_dir, settings.result_name).has_only_begun
    )
