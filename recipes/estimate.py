"""Predict the memory of a training run before anything is downloaded or loaded, and the cards that it fits.

tune run recipes/estimate.py --config configs/llama2_7b_qlora.yaml batch_size=4 max_seq_len=2048
"""

import sys
from functools import partial

import torch

from custom_components.config.components import instantiate
from custom_components.config.distributed_settings import DistributedSettings
from custom_components.config.reading import load_settings
from custom_components.config.training_kinds import EstimateSettings
from custom_components.memory.estimate import estimate_memory
from custom_components.memory.report import MANY_TOKENS, MemoryLine, card_table, memory_table
from custom_components.models.token_rows import train_token_rows
from custom_components.recipe_parts.step_choices import step_choices, step_parts
from custom_components.runtime.devices import resolved_device, resolved_dtype
from custom_components.runtime.errors import UserError, run_recipe
from custom_components.runtime.terminal import say
from custom_components.weights.checkpoint_files import open_checkpoint


def recipe_main() -> None:
    settings = load_settings(EstimateSettings, sys.argv[1:])
    device = resolved_device(settings.device)
    dtype, dtype_words = resolved_dtype(settings.dtype, device)
    if "checkpoint_dir" in settings.model:
        open_checkpoint(settings.checkpoint_dir)
    with torch.device("meta"):
        model = instantiate(settings.model)
    if trained_tokens := settings.tokenizer.get("trainable_tokens"):
        # As if all of them were new: the tokenizer need not be there yet.
        first_id = model.tok_embeddings.num_embeddings
        train_token_rows(model, range(first_id, first_id + len(trained_tokens)))
    row_tokens = min(settings.max_seq_len or model.max_seq_len, model.max_seq_len)
    batch_size = 1 if settings.batch_size == "auto" else settings.batch_size
    rows = "packs" if settings.packed else "rows"
    say(f"{batch_size} {rows} of {row_tokens} tokens a forward, every token supervised; dtype {dtype_words}")

    for parallelism in ways_to_divide(settings):
        num_devices = settings.nproc_per_node
        if num_devices > 1:
            say(f"\non each of {num_devices} devices, with parallelism={parallelism}:")
        parts = step_parts(settings, num_devices if parallelism == "shard" else 1)
        estimate = estimate_memory(model, parts, dtype, device.type, [row_tokens] * batch_size)
        print(memory_table(estimate, device.type, settings.enable_activation_checkpointing))
        card_dtype = torch.bfloat16 if settings.dtype == "auto" else dtype
        on_card = partial(estimate_memory, model, parts, card_dtype, "cuda")
        this_config = on_card([row_tokens] * batch_size)
        many = max(2, MANY_TOKENS // row_tokens)
        line = MemoryLine(many * row_tokens, on_card([row_tokens] * many), on_card([row_tokens] * 2 * many))
        print(card_table(this_config, line, step_choices(settings)))


def ways_to_divide(settings: EstimateSettings) -> list[str]:
    """List the ways to divide the run over its devices that are to be shown: that of the config, or with auto both.

    Raises:
        UserError: several devices, and the recipe is for one.
    """
    if settings.nproc_per_node == 1:
        return ["replicate"]
    if not isinstance(settings, DistributedSettings):
        raise UserError(
            f"nproc_per_node: {settings.nproc_per_node} devices, and the recipe of this config is for one; "
            "recipes/lora_distributed.py trains adapters on several"
        )
    return ["replicate", "shard"] if settings.parallelism == "auto" else [settings.parallelism]


if __name__ == "__main__":
    run_recipe(recipe_main)
