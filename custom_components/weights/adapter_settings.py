"""The sizes and the variant of a model's adapters, read off its modules."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torchtune.modules import TransformerDecoder

from custom_components.models.linear_names import TARGETS, hugging_face_module
from custom_components.models.lora import FrozenLinear, adapter_modules
from custom_components.models.token_rows import added_rows, token_rows
from custom_components.weights.peft_format import TOKEN_MATRICES

T = TypeVar("T")


@dataclass(frozen=True)
class AdapterSettings:
    """The sizes and the variant of a model's adapters.

    Attributes:
        target_modules: the kinds of linear layers that have an adapter, by PEFT's names; or, where not all of these
            kinds have one in each of the adapted layers, the names of the modules.
        rank, alpha: of most of them.
        rank_pattern, alpha_pattern: of the others, by PEFT's names of them or of their kind.
        layers: the numbers of the layers with adapters; None: all layers.
        token_ids: the tokens whose rows are trained, by PEFT's name of the matrix; None: none are.
        num_embeddings: rows of the vocabulary; None: those of the checkpoint.
        flags: the variant, see :attr:`LoRALinear.peft_flags`.
    """

    target_modules: list[str]
    rank: int
    alpha: float
    dropout: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    layers: list[int] | None
    token_ids: Mapping[str, list[int]] | None
    num_embeddings: int | None
    flags: Mapping[str, bool]

    @property
    def peft_entries(self) -> dict[str, object]:
        """Give what only some adapters have as entries of PEFT's config."""
        entries = {
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "layers_to_transform": self.layers,
            "trainable_token_indices": self.token_ids,
            **self.flags,
        }
        return {key: value for key, value in entries.items() if value}


def adapter_settings(model: TransformerDecoder) -> AdapterSettings:
    """Read the settings off a model that has adapters, which are of one variant."""
    modules = adapter_modules(model)
    first = next(iter(modules.values()))
    names = {name: hugging_face_module(name) for name in modules}
    rank, rank_pattern = _common_value({names[name]: module.exported_rank for name, module in modules.items()})
    alpha, alpha_pattern = _common_value({names[name]: module.exported_alpha for name, module in modules.items()})
    targets = target_names(modules)
    layers = sorted({int(name.split(".")[1]) for name in modules if name != "output"})
    in_each = [f"layers.{layer}" for layer in layers]
    of_kinds = {
        name
        for name, module in model.named_modules()
        if isinstance(module, FrozenLinear)
        and hugging_face_module(name).rpartition(".")[2] in targets
        and (name == "output" or ".".join(name.split(".")[:2]) in in_each)
    }
    return AdapterSettings(
        target_modules=targets if of_kinds == modules.keys() else sorted(names.values()),
        rank=rank,
        alpha=alpha,
        dropout=first.dropout,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        layers=None if len(layers) == len(model.layers) or of_kinds != modules.keys() else layers,
        token_ids=_token_ids(model),
        num_embeddings=model.tok_embeddings.num_embeddings if added_rows(model) else None,
        flags=first.peft_flags,
    )


def _token_ids(model: TransformerDecoder) -> dict[str, list[int]] | None:
    rows = token_rows(model)
    token_ids = {name: rows[matrix].token_ids.tolist() for name, matrix in TOKEN_MATRICES.items() if matrix in rows}
    return {name: ids for name, ids in token_ids.items() if ids} or None


def _common_value(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """Find the value that most modules have, and those of the others: of a kind where all of it have the same."""
    of_kind: dict[str, set[T]] = {}
    for module, value in values.items():
        of_kind.setdefault(module.rpartition(".")[2], set()).add(value)
    common = Counter(values.values()).most_common(1)[0][0]
    pattern = {}
    for module, value in values.items():
        kind = module.rpartition(".")[2]
        if value != common:
            pattern[kind if len(of_kind[kind]) == 1 else module] = value
    return common, pattern


def target_names(modules: Iterable[str]) -> list[str]:
    """Give PEFT's target_modules for the names of modules, in the order in which a layer computes them."""
    names = {name.rpartition(".")[2] for name in modules}
    return [target for target, name in TARGETS.items() if name in names]
