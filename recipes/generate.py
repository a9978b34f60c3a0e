"""Answer a prompt with a base model or with an adapter on it.

tune run recipes/generate.py --config configs/generate.yaml checkpoint_dir=... adapter_dir=... prompt="..."
"""

import sys

from torchtune.modules.peft import disable_adapter

from custom_components.adapters import load_model_for_inference, read_prompt_format
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

    tokenizer = Llama2ChatTransform(settings.checkpoint_dir / "tokenizer.model")
    dialog = [{"role": "user", "content": settings.prompt}]
    if system_prompt := chosen_system_prompt(settings):
        dialog.insert(0, {"role": "system", "content": system_prompt})
    model = load_model_for_inference(
        settings.checkpoint_dir, settings.adapter_dir, settings.quantize_base, dtype, device
    )

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


def chosen_system_prompt(settings: GenerationSettings) -> str | None:
    """The config's system prompt, else the one that the adapter was trained with; says so where they differ."""
    prompt_format = read_prompt_format(settings.adapter_dir) if settings.adapter_dir else None
    trained = prompt_format.system_prompt if prompt_format else None
    if settings.system_prompt is None:
        return trained
    if prompt_format and settings.system_prompt != trained:
        print(f"warning: the adapter was trained with system_prompt {trained!r}", file=sys.stderr)
    return settings.system_prompt


if __name__ == "__main__":
    run_recipe(recipe_main)
