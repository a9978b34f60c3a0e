"""A whole model's weights as a run keeps them: a Hugging Face directory, at every checkpoint and as the result."""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torchtune.modules import RMSNorm, TransformerDecoder

from custom_components.runs.recognition import MODEL_NAME, RESULTS
from custom_components.runtime.atomic_files import whole_directory
from custom_components.runtime.errors import UserError
from custom_components.transforms.chat_transform import ChatTransform
from custom_components.transforms.prompt_format import PromptFormat
from custom_components.transforms.tokenizer_files import exported_tokenizer, template_of_format, write_tokenizer
from custom_components.weights.checkpoint_files import BaseCheckpoint, open_checkpoint
from custom_components.weights.checkpoint_loading import check_base_weights
from custom_components.weights.hugging_face_writing import write_config, write_weights

# What `link` says where a file system has no hard links, or not across these two places.
_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)


@dataclass(frozen=True)
class ModelWeights:
    """The weights of a model, trained and frozen, in the dtypes that they are trained in.

    Attributes:
        base: the checkpoint that the model was begun with.
        files: those of the directory besides the weights, content by name: see :func:`files_beside_weights`.
    """

    name: ClassVar[str] = MODEL_NAME
    model: TransformerDecoder
    base: BaseCheckpoint
    files: Mapping[str, bytes]

    @property
    def num_bytes(self) -> int:
        """The size of the directory on disk."""
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        return weights + sum(map(len, self.files.values()))

    def save(self, directory: Path) -> None:
        parameters = dict(self.model.named_parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        directory.mkdir()
        write_weights(directory, self._tensors(), shapes, self.base.shape, dtypes)
        for name, content in self.files.items():
            (directory / name).write_bytes(content)

    def load(self, directory: Path) -> None:
        sources = check_base_weights(self.model, open_checkpoint(directory))
        with torch.no_grad():
            for name, source in sources.items():
                self.model.get_parameter(name).copy_(source.read())

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach().cpu()


def files_beside_weights(
    folder: Path, base: BaseCheckpoint, transform: ChatTransform, prompt_format: PromptFormat, dtype: torch.dtype
) -> dict[str, bytes]:
    """Make the files that a Hugging Face directory has besides the weights, once for all checkpoints of a run.

    Args:
        folder: of the run, where they are written for a moment.
        transform: of the rows that are trained on.
        dtype: of the model's matrices.
    """
    tokenizer = exported_tokenizer(transform, template_of_format(transform, prompt_format))
    aside = folder / f".{MODEL_NAME}.writing-{os.getpid()}"
    aside.mkdir()
    try:
        write_config(
            aside,
            base,
            base.shape,
            dtype,
            bos_id=tokenizer.tokenizer.bos_id,
            stop_ids=tokenizer.stop_tokens,
            pad_id=tokenizer.pad_id,
        )
        write_tokenizer(aside, tokenizer, base.shape.max_seq_len)
        files = {path.name: path.read_bytes() for path in aside.iterdir()}
    finally:
        shutil.rmtree(aside)
    return files | {name: text.encode() for name, text in prompt_format.texts().items()}


def save_linked_model(checkpoint_model: Path, result: Path, card: Mapping[str, str]) -> None:
    """Make a run's result of the model of one of its checkpoints: the same weights on disk, not a copy of them.

    Args:
        checkpoint_model: `model/` of a run checkpoint.
        result: replaced if it exists.
        card: content by file name.

    Raises:
        UserError: at `result` is something that no run wrote.
    """
    with whole_directory(result, replaces=RESULTS[MODEL_NAME]) as directory:
        for path in checkpoint_model.iterdir():
            if path.suffix == ".safetensors":
                _link(path, directory / path.name)
            else:
                shutil.copyfile(path, directory / path.name)
        for name, text in card.items():
            (directory / name).write_text(text, encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        print(f"{target.parent.parent}: the file system has no hard links, so {source.name} is copied")
        shutil.copyfile(source, target)


def check_model_was_trained(model: TransformerDecoder, base: BaseCheckpoint) -> None:
    """Refuse a model that is as it was, or broken.

    Raises:
        UserError: no trained weight differs from the base's, or a value is not finite.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if broken := [name for name, parameter in trained.items() if not parameter.isfinite().all()]:
        raise UserError(f"optimizer.lr: {broken[0]} is not finite; lower the learning rate")
    sources = check_base_weights(model, base)
    # note: the first that differs ends it, so that usually one weight is read.
    if not any(_differs(parameter, sources[name].read()) for name, parameter in trained.items()):
        raise UserError("optimizer.lr: no weight has changed, nothing was learned; raise the learning rate")


def _differs(parameter: Tensor, base: Tensor) -> bool:
    return not torch.equal(parameter.detach().cpu(), base.to(parameter.dtype))


def matrix_dtype(model: TransformerDecoder) -> torch.dtype:
    """Give the dtype of a model's trained matrices, else of all: norms are in fp32 whatever it is."""
    norms = {id(p) for module in model.modules() if isinstance(module, RMSNorm) for p in module.parameters()}
    matrices = [parameter for parameter in model.parameters() if id(parameter) not in norms]
    return next((p.dtype for p in matrices if p.requires_grad), matrices[0].dtype)
