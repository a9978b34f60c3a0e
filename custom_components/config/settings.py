"""The base of all settings. Defaults are defined in the classes of this room and nowhere else.

configs/*.yaml have every key with its effect; tests check that the two agree.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from custom_components.config.component_trials import Trial


def path_text(value: Any) -> Any:
    """Refuse a text that cannot be meant as a path.

    Raises:
        ValueError: it is empty, and would be taken as the working directory; or no file can have the name.
    """
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("a path; this is empty: a shell variable may be unset")
        try:
            os.lstat(value)  # noqa: PTH116
        except OSError:
            pass
        except ValueError as error:
            raise ValueError(f"a path ({error})") from None
    return value


# How the base's linear weights are kept; models/quantization.py has the formats.
QuantizationName = Literal["nf4", "nf4_single", "int8", "none"]


def quantization_problems(quantize_base: bool, quantization: str | None) -> Iterator[tuple[str, str]]:
    """Yield a problem if the two settings are at odds."""
    if quantize_base and quantization not in (None, "nf4"):
        yield (
            "quantization",
            f"{quantization} beside quantize_base true, which is nf4; set quantize_base=false, or quantization=null",
        )


def _in_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"a path ({error})") from None


@dataclass(frozen=True)
class Words:
    """Words for the values of a key in `--help`, where its annotation does not tell them."""

    words: str


def _checked_device(name: Any) -> Any:
    if isinstance(name, str) and _DEVICE.fullmatch(name):
        return name
    number = re.fullmatch(r"(?:gpu|cuda)?[:_ ]?(\d+)", str(name).lower())
    if number:
        raise ValueError(f"cuda:{number[1]}")
    if str(name).lower() in ("gpu", "cuda", "hip", "rocm", "nvidia"):
        raise ValueError("cuda, torch's name of NVIDIA's and AMD's cards, or auto")
    if str(name).lower() in ("mps", "metal", "mlx"):
        raise ValueError("auto or cpu: Apple's GPU is not supported, because 4-bit NF4 weights do not work there")
    raise ValueError("auto, cpu, cuda or cuda:N; no other device is supported")


def _our_dtype_name(name: Any) -> Any:
    """Shorten torch's own spelling, `torch.bfloat16` or `bfloat16`; what is not one is left to be refused."""
    return _TORCH_DTYPES.get(name.removeprefix("torch."), name) if isinstance(name, str) else name


_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_TORCH_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}

# Larger numbers are slips, and would be counted up to or reserved in memory.
_MOST = 2**40
Count = Annotated[int, Field(gt=0, le=_MOST)]
CountOrZero = Annotated[int, Field(ge=0, le=_MOST)]
Rank = Annotated[int, Field(gt=0, le=2**20)]

PathText = Annotated[Path, BeforeValidator(path_text), AfterValidator(_in_home)]
Device = Annotated[str, BeforeValidator(_checked_device), Words("auto, cpu, cuda or cuda:N")]
DtypeName = Annotated[Literal["auto", "bf16", "fp16", "fp32"], BeforeValidator(_our_dtype_name)]
# Hugging Face's names of the attention projections are taken as well as torchtune's.
AttentionModule = Literal["q_proj", "k_proj", "v_proj", "output_proj", "o_proj"]


@dataclass(frozen=True)
class ComponentNode:
    """Marks a field as a node with a `_component_`, and says what the recipe needs of it.

    Attributes:
        ours: the component to name where another does not fit.
        supplied: the arguments that the recipe adds.
        of_others: arguments of our component that are for other tools' recipes only, and unknown keys here.
        libraries: starts of the paths that fit, beside this project's and the user's own.
        methods: of what the component makes, those that the recipe calls, with their number of arguments.
        attributes: of what the component makes, those that the recipe reads.
        trial: called with the component and its keys; it raises what they are refused for.
        of_other_recipes: components of ours that would fit by their methods, and the recipe that each is for.
        counterparts: for some of these, the component to name here; for the others it is `ours`.
    """

    ours: str
    supplied: tuple[str, ...] = ()
    of_others: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    methods: Mapping[str, int] = field(default_factory=dict)
    attributes: tuple[str, ...] = ()
    trial: Trial | None = None
    of_other_recipes: Mapping[str, str] = field(default_factory=dict)
    counterparts: Mapping[str, str] = field(default_factory=dict)


# torchtune's names of the nodes that the recipes share.
TOKENIZER = ComponentNode(
    "custom_components.transforms.Llama2ChatTransform", methods={"render": 1, "encode_turns": 1, "decode": 1}
)
DATASET = ComponentNode(
    "custom_components.datasets.chat_dataset",
    supplied=("tokenizer",),
    of_others=("packed",),
    methods={"__len__": 0, "__getitem__": 1, "rows": 1, "content_digest": 1, "prompt_digest": 1},
    attributes=("lengths", "digest", "summaries"),
    of_other_recipes={"custom_components.datasets.preference_dataset": "recipes/lora_dpo_single_device.py"},
)


class Settings(BaseModel):
    """The base of all settings: unknown keys and wrong types are errors, values do not change.

    Attributes:
        alternatives: pairs of keys of which the one typed on the command line replaces the other in the file.
    """

    alternatives: ClassVar[tuple[tuple[str, str], ...]] = ()

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @classmethod
    def for_config(cls, values: Mapping[str, Any]) -> "type[Settings]":
        """Give the class to check a config's values with: this one, unless it stands for several."""
        return cls

    def combination_problems(self) -> Iterator[tuple[str, str]]:
        """Find values that are valid alone but not together: their keys, each with a message."""
        return iter(())

    def notes(self) -> Iterator[str]:
        """Name settings that another one overrides, and valid values that may not be intended."""
        return iter(())
