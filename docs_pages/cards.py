"""docs/cards.md: which config fits which card, and how long it may take, by the estimate of recipes/estimate.py."""

import os
from collections.abc import Mapping
from contextlib import chdir
from dataclasses import dataclass
from functools import partial

import torch

from custom_components.config.components import instantiate
from custom_components.config.lora_settings import LoRASettings
from custom_components.config.reading import load_settings
from custom_components.memory.estimate import MemoryEstimate, Recomputing, estimate_memory
from custom_components.memory.report import MANY_TOKENS, MemoryLine, card_verdict, usable_card_bytes, way_on_card
from custom_components.recipe_parts.step_choices import step_choices, step_parts
from docs_pages.blocks import PROJECT, table

# In this order; the configs whose model's sizes need no checkpoint.
CONFIGS = (
    "tinyllama_1b_chat_qlora",
    "own_pairs_openllama_3b_qlora",
    "own_pairs_llama2_7b_chat_qlora",
    "guanaco_7b_chat_qlora",
    "alpaca_7b_qlora",
    "llama2_7b_qlora",
    "llama2_7b_chat_t4",
    "codellama_7b_qlora",
    "llama2_7b_lora",
    "llama3_2_1b_qlora",
    "llama3_1_8b_qlora",
    "llama2_13b_qlora",
    "llama2_70b_qlora",
)
CARDS = ("T4 16 GB", "RTX 4090 24 GB", "A100 40 GB", "A100 80 GB", "H100 80 GB")
TIMED_CARDS = {"T4 16 GB": "a T4", "RTX 4090 24 GB": "an RTX 4090", "A100 40 GB": "an A100"}
# Tokens of a whole run, counted with Llama 2's tokenizer after rows are cut to the config's max_seq_len; Alpaca's from
# a sample of 100 rows (137 tokens a row).
RUN_TOKENS = {
    "tinyllama_1b_chat_qlora": 420_490,
    "guanaco_7b_chat_qlora": 10 * 218_813,
    "alpaca_7b_qlora": 52_002 * 137,
    "llama2_7b_qlora": 420_490,
    "llama2_7b_chat_t4": 458_171,
}
# Dense 16-bit TFLOP/s with fp32 accumulation: NVIDIA's data sheets of T4, A100 and H100 SXM, and its Ada white paper.
_PEAK_TFLOPS = {"T4 16 GB": 65, "RTX 4090 24 GB": 165, "A100 40 GB": 312, "A100 80 GB": 312, "H100 80 GB": 989}
_REACHED_SHARE = 1 / 3
# Per weight and token: 2 in the forward, 2 for the gradient of the layer's input; a frozen weight has no gradient.
_FLOPS_PER_WEIGHT = 4.0
# Recomputing a layer repeats its forward, except the last product.
_RECOMPUTED_FLOPS_PER_WEIGHT = 1.6
_GIB = 2**30


@dataclass(frozen=True)
class ConfigOnCards:
    """The estimates of a config for CUDA.

    Attributes:
        row_tokens: of its longest rows.
        this_config: for its own forward.
        line: memory by tokens.
    """

    settings: LoRASettings
    row_tokens: int
    this_config: MemoryEstimate
    line: MemoryLine

    def verdict(self, card: str) -> str:
        if card.startswith("T4") and self.settings.dtype == "bf16":
            return "has no bf16"
        return card_verdict(self.this_config, usable_card_bytes(card), step_choices(self.settings))

    def largest_forward_tokens(self, card: str, *, offloads_inputs: bool = False) -> int:
        return self.line.largest_forward_tokens(usable_card_bytes(card), offloads_inputs=offloads_inputs)

    def largest_offloaded(self, card: str) -> str:
        """Give the largest forward with the inputs of layers in the host's memory, and how much that is."""
        num_tokens = self.largest_forward_tokens(card, offloads_inputs=True)
        return f"{num_tokens:,} ({self.line.offloaded_bytes(num_tokens) / _GIB:.0f})" if num_tokens else "–"

    def run_seconds(self, card: str, num_tokens: int) -> float | None:
        """Calculate the time of a run's matrix products at a third of the card's peak; None where it does not fit."""
        recomputing = way_on_card(self.this_config, usable_card_bytes(card), step_choices(self.settings))
        if recomputing is None:
            return None
        share = recomputing.num_layers / self.this_config.num_layers
        flops = (_FLOPS_PER_WEIGHT + share * _RECOMPUTED_FLOPS_PER_WEIGHT) * self.this_config.num_parameters["NF4"]
        return num_tokens * flops / (_REACHED_SHARE * _PEAK_TFLOPS[card] * 1e12)


def on_cards(name: str) -> ConfigOnCards:
    """Estimate a config's memory on CUDA, in bf16 unless it names another dtype."""
    with chdir(PROJECT):
        settings = load_settings(LoRASettings, ["--config", f"configs{os.sep}{name}.yaml"])
    with torch.device("meta"):
        model = instantiate(settings.model)
    row_tokens = min(settings.max_seq_len or model.max_seq_len, model.max_seq_len)
    assert settings.batch_size != "auto"
    dtype = torch.float16 if settings.dtype == "fp16" else torch.bfloat16
    estimate = partial(estimate_memory, model, step_parts(settings), dtype, "cuda")
    many = max(2, MANY_TOKENS // row_tokens)
    line = MemoryLine(many * row_tokens, estimate([row_tokens] * many), estimate([row_tokens] * 2 * many))
    return ConfigOnCards(settings, row_tokens, estimate([row_tokens] * settings.batch_size), line)


def memory_row(name: str, config: ConfigOnCards) -> list[str]:
    estimate = config.this_config
    return [
        f"`{name}.yaml`",
        f"{config.settings.batch_size} × {config.row_tokens:,}",
        f"{estimate.num_parameters['trained']:,}",
        f"{estimate.base_bytes / _GIB:.1f}",
        f"{estimate.peak_bytes(Recomputing()) / _GIB:.1f}",
        f"{estimate.peak_bytes(estimate.all_recomputed) / _GIB:.1f}",
    ]


def header_lines(name: str, config: ConfigOnCards) -> list[str]:
    """Write the lines on memory and, where the tokens of its run are counted, on time for the top of a ready config."""
    estimate = config.this_config
    smallest = next(card for card in CARDS if config.verdict(card).startswith("fits"))
    lines = [
        f"# Memory: {estimate.peak_bytes(Recomputing()) / _GIB:.1f} GiB on a card, "
        f"{estimate.peak_bytes(estimate.all_recomputed) / _GIB:.1f} with all layers recomputed (estimate.py); "
        f"{smallest}: {config.verdict(smallest)}."
    ]
    if num_tokens := RUN_TOKENS.get(name):
        times = ", ".join(
            f"{_duration(config.run_seconds(card, num_tokens))} on {words}" for card, words in TIMED_CARDS.items()
        )
        lines.append(f"# Time: {times} (calculated, see docs/cards.md; not measured).")
    return lines


def blocks(configs: Mapping[str, ConfigOnCards]) -> dict[str, str]:
    """Write the tables of docs/cards.md, by name."""
    return {
        "memory": table(
            ["config", "rows × tokens", "trained", "base, GiB", "peak, GiB", "all layers recomputed, GiB"],
            [memory_row(name, config) for name, config in configs.items()],
            numbers=True,
        ),
        "fits": table(
            ["config", *CARDS],
            [[f"`{name}.yaml`", *map(config.verdict, CARDS)] for name, config in configs.items()],
            numbers=True,
        ),
        "largest-forward": table(
            ["config", *CARDS],
            [
                [f"`{name}.yaml`", *(_count(config.largest_forward_tokens(card)) for card in CARDS)]
                for name, config in configs.items()
            ],
        ),
        "largest-offloaded": table(
            ["config", *CARDS],
            [[f"`{name}.yaml`", *map(config.largest_offloaded, CARDS)] for name, config in configs.items()],
            numbers=True,
        ),
        "time": table(
            ["config", "tokens of the run", *CARDS],
            [
                [
                    f"`{name}.yaml`",
                    f"{num_tokens:,}",
                    *(_duration(configs[name].run_seconds(card, num_tokens)) for card in CARDS),
                ]
                for name, num_tokens in RUN_TOKENS.items()
                if name in configs
            ],
        ),
    }


def _count(number: int) -> str:
    return f"{number:,}" if number else "–"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes = seconds / 60
    if minutes < 1:
        return "under a minute"
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
