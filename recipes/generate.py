"""Answer a prompt with a base model or with an adapter on it.

tune run recipes/generate.py --config configs/generate.yaml checkpoint_dir=... adapter_dir=... prompt="..."
"""

import sys
from typing import Any

from torchtune.modules.peft import disable_adapter

from custom_components.adapters import load_model_for_inference, read_prompt_format
from custom_components.checkpoint_loading import fit_tokenizer
from custom_components.config import load_settings
from custom_components.errors import UserError, run_recipe
from custom_components.generation import Sampling, answer_messages
from custom_components.precision import resolved_device, resolved_dtype
from custom_components.settings import GenerationSettings
from custom_components.transforms import Llama2ChatTransform


def recipe_main() -> None:
    settings = load_settings(GenerationSettings, sys.argv[1:])
    device = resolved_device(settings.device)
    dtype, _ = resolved_dtype(settings.dtype, device)
    if not settings.prompt.strip():
        raise UserError('prompt: is empty; give it as prompt="..."')

    tokenizer = tokenizer_for(settings)
    dialog = [{"role": "user", "content": settings.prompt}]
    model = load_model_for_inference(
        settings.checkpoint_dir, settings.adapter_dir, settings.quantize_base, dtype, device
    )
    fit_tokenizer(tokenizer, model)

    def answer() -> str:
        return answer_messages(
            model,
            tokenizer,
            [dialog],
            max_new_tokens=settings.max_new_tokens,
            sampling=Sampling(settings.temperature, settings.top_k, settings.seed),
            dtype=dtype,
        )[0]

    if settings.compare:
        with disable_adapter(model):
            print(f"base   {answer()}")
        print(f"tuned  {answer()}")
    else:
        print(answer())


def tokenizer_for(settings: GenerationSettings) -> Llama2ChatTransform:
    """The prompt format that the adapter was trained with, unless the config says otherwise: then it warns."""
    trained = read_prompt_format(settings.adapter_dir) if settings.adapter_dir else None
    chosen: dict[str, Any] = {}
    for name, default in (("prompt_template", "llama2"), ("system_prompt", None)):
        trained_value = getattr(trained, name) if trained else default
        told = getattr(settings, name)
        if trained and told is not None and told != trained_value:
            print(f"warning: {name} is {told!r}, the adapter was trained with {trained_value!r}", file=sys.stderr)
        chosen[name] = trained_value if told is None else told
    tokenizer = Llama2ChatTransform(settings.checkpoint_dir / "tokenizer.model", **chosen)
    if trained is not None:
        tokenizer.stop_tokens = tokenizer.ids_of_pieces(trained.stop_tokens)
    return tokenizer


if __name__ == "__main__":
    run_recipe(recipe_main)
