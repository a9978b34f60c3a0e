"""The base of all settings. Defaults are defined in the classes of this room and nowhere else.

configs/*.yaml name every key and say its effect; tests hold the two together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

PathText = Annotated[Path, AfterValidator(Path.expanduser)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
DtypeName = Literal["auto", "bf16", "fp16", "fp32"]
# Hugging Face's names of the attention projections are taken as well as torchtune's.
AttentionModule = Literal["q_proj", "k_proj", "v_proj", "output_proj", "o_proj"]


@dataclass(frozen=True)
class ComponentNode:
    """Marks a field as a node with a `_component_`; `supplied` names the arguments that the recipe adds."""

    supplied: tuple[str, ...] = ()


class Settings(BaseModel):
    """The base of all settings: unknown keys and wrong types are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def combination_problems(self) -> Iterator[tuple[str, str]]:
        """Keys whose values are right apart and wrong together, each with a message."""
        return iter(())
