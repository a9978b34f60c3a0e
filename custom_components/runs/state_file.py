"""state.pt of a run checkpoint: what it has, and reading it."""

import math
import zipfile
from pathlib import Path
from typing import Annotated, Any

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from custom_components.runs.recognition import STATE_NAME
from custom_components.runtime.errors import UserError
from custom_components.runtime.torch_files import load_torch_file
from custom_components.runtime.validation import value_problems

# Raised where a state is written that earlier versions of this package would read wrongly.
STATE_VERSION = 1
_NUM_BYTES = 2**22  # hashed at a time

_Count = Annotated[int, Field(ge=0)]


class _Progress(BaseModel):
    """:class:`Progress`, every key of it: a run never goes on from a default."""

    model_config = ConfigDict(strict=True, extra="forbid")

    num_steps: _Count
    num_skipped_steps: _Count
    num_tokens: _Count
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    best_val_loss: float
    best_step: _Count | None
    num_validations_since_best: _Count

    @model_validator(mode="after")
    def _agrees(self) -> "_Progress":
        if math.isnan(self.best_val_loss) or math.isinf(self.best_val_loss) != (self.best_step is None):
            raise ValueError(f"best_val_loss {self.best_val_loss} does not go with best_step {self.best_step}")
        if max(self.best_step or 0, self.num_skipped_steps) > self.num_steps:
            raise ValueError(f"num_steps {self.num_steps} is less than the steps that are counted beside it")
        return self


class _Optimizer(BaseModel):
    model_config = ConfigDict(strict=True)

    state: dict[Any, dict[str, Any]]
    param_groups: list[dict[str, Any]]


class _OptimizerOfEach(BaseModel):
    """Of :class:`OptimizerInBackward`: an optimizer for each parameter."""

    model_config = ConfigDict(strict=True)

    of_parameters: list[_Optimizer]


class _State(BaseModel):
    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)

    optimizer: _Optimizer | _OptimizerOfEach
    scaler: dict[str, Any]
    data_digest: str
    progress: _Progress
    best_adapter: dict[str, Tensor]
    # Not in states of before this was kept.
    weights: dict[str, str] = {}


def weights_digests(directory: Path) -> dict[str, str]:
    """Hash the files of trained weights in a checkpoint's adapter/ or model/, by name: as fast as a disk reads."""
    digests = {}
    for file in sorted(directory.glob("*.safetensors")):
        digest = xxhash.xxh3_128()
        with file.open("rb") as content:
            while piece := content.read(_NUM_BYTES):
                digest.update(piece)
        digests[file.name] = digest.hexdigest()
    return digests


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the state of a run checkpoint, as :func:`save_run_checkpoint` stored it.

    Raises:
        UserError: it is damaged, of a newer version, or of another step than the directory's name says.
    """
    try:
        state = load_torch_file(checkpoint / STATE_NAME)
        # note: torch does not compare the check sums that it writes.
        with zipfile.ZipFile(checkpoint / STATE_NAME) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{STATE_NAME}: {damaged} is damaged")
        if not isinstance(state, dict):
            raise ValueError(f"{STATE_NAME} holds {type(state).__name__}, not a mapping")
        version = state.get("version", 1)
        if type(version) is int and version > STATE_VERSION:
            raise UserError(
                f"resume_from_checkpoint: {str(checkpoint)!r} is of a newer version of this package (its state is of "
                f"version {version}, this one reads up to {STATE_VERSION}); update the package"
            )
        num_steps = _State.model_validate(state).progress.num_steps
        if num_steps != int(checkpoint.name.rpartition("_")[2]):
            raise ValueError(f"{STATE_NAME} is of step {num_steps}")
    except UserError:
        raise
    except ValidationError as error:
        place, message = next(iter(value_problems(error, state, lambda place: "").items()))
        reason = f"{STATE_NAME}: {place.removeprefix('.')}: {message}"
        raise UserError(f"resume_from_checkpoint: {str(checkpoint)!r} is not a whole checkpoint ({reason})") from None
    except (ValueError, OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"resume_from_checkpoint: {str(checkpoint)!r} is not a whole checkpoint ({error})") from None
    return state
