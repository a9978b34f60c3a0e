"""Predict the memory of a training run before anything is downloaded or loaded, and the cards that it fits.

tune run recipes/estimate.py --config configs/llama2_7b_qlora.yaml batch_size=4 max_seq_len=2048
"""

import sys
from functools import partial

import torch

from custom_components.config.components import instantiate
from custom_components.config.reading import load_settings
from custom_components.config.training_kinds import AnyTrainingSettings
from custom_components.memory.estimate import estimate_memory
from custom_components.memory.report import MANY_TOKENS, MemoryLine, card_table, memory_table
from custom_components.models.token_rows import train_token_rows
from custom_components.recipe_parts.step_choices import step_choices, step_parts
from custom_components.runtime.devices import resolved_device, resolved_dtype
from custom_components.runtime.errors import run_recipe
from custom_components.runtime.terminal import say
from custom_components.weights.checkpoint_files import open_checkpoint


def recipe_main() -> None:
    settings = load_settings(AnyTrainingSettings, sys.argv[1:])
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

    parts = step_parts(settings)
    estimate = estimate_memory(model, parts, dtype, device.type, [row_tokens] * batch_size)
    print(memory_table(estimate, device.type, settings.enable_activation_checkpointing))
    card_dtype = torch.bfloat16 if settings.dtype == "auto" else dtype
    on_card = partial(estimate_memory, model, parts, card_dtype, "cuda")
    this_config = on_card([row_tokens] * batch_size)
    many = max(2, MANY_TOKENS // row_tokens)
    line = MemoryLine(many * row_tokens, on_card([row_tokens] * many), on_card([row_tokens] * 2 * many))
    print(card_table(this_config, line, step_choices(settings)))


if __name__ == "__main__":
    run_recipe(recipe_main)
