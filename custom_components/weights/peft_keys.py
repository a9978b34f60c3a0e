"""The keys of an adapter_config.json that are read here: their types and ranges; others are left alone."""

from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from custom_components.runtime.patterns import checked_pattern

T = TypeVar("T")

_Pattern = Annotated[str, Field(min_length=1), AfterValidator(checked_pattern)]
_Rank = Annotated[int, Field(gt=0, le=2**20)]
# An integer stays one: it is compared and written as it was.
_Alpha = Annotated[int, Field(gt=0, le=2**53)] | Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Layer = Annotated[int, Field(ge=0, le=1000)]
_Token = Annotated[int, Field(ge=0, le=2**24)]


class PeftKeys(BaseModel):
    """adapter_config.json."""

    model_config = ConfigDict(strict=True, frozen=True)

    r: _Rank
    lora_alpha: _Alpha
    target_modules: _Pattern | Annotated[list[str], Field(min_length=1)]
    exclude_modules: str | list[str] | None = None
    layers_to_transform: _Layer | list[_Layer] | None = None
    layers_pattern: str | list[_Pattern] | None = None
    rank_pattern: dict[_Pattern, _Rank] | None = None
    alpha_pattern: dict[_Pattern, _Alpha] | None = None
    modules_to_save: str | list[_Pattern] | None = None
    trainable_token_indices: list[_Token] | dict[str, list[_Token]] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None


def as_list(value: T | list[T] | None) -> list[T]:
    """Give what may be one or several as a list; nothing is an empty one."""
    if isinstance(value, list):
        return value
    return [] if value is None or value == "" else [value]
