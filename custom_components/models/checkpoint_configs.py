"""The keys of a checkpoint's config.json or params.json that decide its shape: their types and ranges.

Keys that are not named here are left alone. Ranges are wider than any published model: they keep a damaged number from
asking for a billion layers.
"""

from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from custom_components.runtime.errors import UserError
from custom_components.runtime.validation import shown, value_problems

Layers = Annotated[int, Field(gt=0, le=1000)]
Heads = Annotated[int, Field(gt=0, le=1024)]
Width = Annotated[int, Field(gt=0, le=2**20)]
Rows = Annotated[int, Field(gt=0, le=2**24)]
Tokens = Annotated[int, Field(gt=0, le=2**30)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Epsilon = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


class _Keys(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class RopeKeys(_Keys):
    """`rope_parameters`, as transformers 5 writes it, or `rope_scaling`, as 4 wrote it."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Tokens | None = None
    partial_rotary_factor: Positive | None = None

    @property
    def kind(self) -> str:
        return self.rope_type or self.type or "default"


class HuggingFaceKeys(_Keys):
    """config.json; the defaults are those of transformers' LlamaConfig."""

    vocab_size: Rows
    num_hidden_layers: Layers
    num_attention_heads: Heads
    num_key_value_heads: Heads | None = None
    hidden_size: Width
    intermediate_size: Width
    head_dim: Width | None = None
    max_position_embeddings: Tokens = 2048
    sliding_window: Tokens | None = None
    rope_theta: Positive | None = None
    rope_parameters: RopeKeys | None = None
    rope_scaling: RopeKeys | None = None
    rms_norm_eps: Epsilon = 1e-6
    tie_word_embeddings: bool | None = None
    hidden_act: str = "silu"
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    partial_rotary_factor: Positive | None = None

    @property
    def rope(self) -> RopeKeys:
        return self.rope_parameters or self.rope_scaling or RopeKeys()

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        _check_heads(
            self.num_attention_heads,
            self.num_key_value_heads,
            self.hidden_size,
            self.head_dim,
            ("num_attention_heads", "num_key_value_heads", "hidden_size"),
        )
        return self


class MetaKeys(_Keys):
    """params.json."""

    dim: Width
    n_layers: Layers
    n_heads: Heads
    n_kv_heads: Heads | None = None
    # Llama 2's has -1.
    vocab_size: Annotated[int, Field(ge=-1, le=2**24)] = -1
    multiple_of: Width = 256
    ffn_dim_multiplier: Annotated[float, Field(gt=0, le=1024, allow_inf_nan=False)] | None = None
    hidden_dim: Width | None = None
    head_dim: Width | None = None
    norm_eps: Epsilon
    rope_theta: Positive = 10_000.0
    use_scaled_rope: bool | None = None
    rope_scaling_factor: Positive | None = None

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        names = ("n_heads", "n_kv_heads", "dim")
        _check_heads(self.n_heads, self.n_kv_heads, self.dim, self.head_dim, names)
        return self


_KeysType = TypeVar("_KeysType", bound=_Keys)


def checked_keys(keys_type: type[_KeysType], values: dict[str, Any], path: Path) -> _KeysType:
    """Read the keys of a file.

    Raises:
        UserError: a key is missing, or has a value of another type or out of range; a line for each.
    """
    try:
        return keys_type.model_validate(values)
    except ValidationError as error:
        raise UserError(
            *(
                f"{path}: {place.removeprefix('.')}: {message}; is this a Llama checkpoint's {path.name}?"
                if place
                else f"{path}: {message.removeprefix(f'{shown(values)} should be ')}"
                for place, message in value_problems(error, values, lambda place: "").items()
            )
        ) from None


def _check_heads(
    num_heads: int, num_kv_heads: int | None, embed_dim: int, head_dim: int | None, names: tuple[str, str, str]
) -> None:
    if num_heads % (num_kv_heads or num_heads) != 0:
        raise ValueError(f"{names[0]} {num_heads} is not a multiple of {names[1]} {num_kv_heads}")
    if head_dim is None and embed_dim % num_heads != 0:
        raise ValueError(f"{names[2]} {embed_dim} is not a multiple of {names[0]} {num_heads}")
    if (head_dim or embed_dim // num_heads) % 2 != 0:
        raise ValueError(f"heads of width {head_dim or embed_dim // num_heads} cannot be rotated in pairs")
