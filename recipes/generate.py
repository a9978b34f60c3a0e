"""Answer a prompt, a file of prompts or a person with a base model or with an adapter on it.

tune run recipes/generate.py --config configs/generate.yaml checkpoint_dir=... adapter_dir=... prompt="..."
tune run recipes/generate.py --config configs/generate.yaml ... prompts_file=questions.jsonl output_file=answers.jsonl
tune run recipes/generate.py --config configs/generate.yaml ... chat=true
"""

import contextlib
import sys

from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import disable_adapter
from tqdm import tqdm

from custom_components.config.reading import load_settings
from custom_components.config.task_settings import GenerationSettings
from custom_components.datasets.prompt_files import (
    ANSWER,
    ANSWERS,
    BASE_ANSWER,
    BASE_ANSWERS,
    FilePrompt,
    check_output_file,
    one_prompt,
    read_prompts,
    write_answers,
)
from custom_components.generation.chat import chat
from custom_components.generation.conversation import Conversation
from custom_components.generation.decoding import generate, streamed_answer
from custom_components.generation.incremental import IncrementalLlama, made_for_inference
from custom_components.generation.sampling import Sampling
from custom_components.runtime.devices import resolved_device, resolved_dtype
from custom_components.runtime.errors import UserError, run_recipe
from custom_components.runtime.terminal import say
from custom_components.transforms.chat_transform import ChatTransform
from custom_components.transforms.prompt_format import stated_prompt_format, tokenizer_with_format
from custom_components.transforms.tokenizer_fitting import fit_tokenizer
from custom_components.weights.adapted_model import load_model_for_inference
from custom_components.weights.adapter_files import StoredAdapter, open_adapter
from custom_components.weights.checkpoint_files import BaseCheckpoint, open_checkpoint


def recipe_main() -> None:
    settings = load_settings(GenerationSettings, sys.argv[1:])
    check_that_something_is_asked(settings)
    # Answers have stdout for themselves.
    with contextlib.redirect_stdout(sys.stderr):
        base = open_checkpoint(settings.checkpoint_dir)
        adapter = open_adapter(settings.adapter_dir) if settings.adapter_dir else None
        tokenizer = tokenizer_with_format(
            settings.checkpoint_dir,
            stated_prompt_format(settings.checkpoint_dir, settings.adapter_dir),
            settings.adapter_dir,
            prompt_template=settings.prompt_template,
            system_prompt=settings.system_prompt,
        )
        # Read before the model is loaded, so that errors in them are reported at once.
        prompts = tokenized_prompts(settings, tokenizer, base.shape.max_seq_len)
        loaded = load_model(settings, base, adapter)
        tokenizer = fit_tokenizer(tokenizer, loaded)
        model = made_for_inference(loaded, fold_adapter=settings.fold_adapter)

    if settings.chat:
        conversation = Conversation(model, tokenizer, settings.max_new_tokens, samplings(settings)[0])
        chat(conversation, sys.stdin, is_interactive=sys.stdin.isatty())
    elif settings.output_file is not None:
        answer_file(model, tokenizer, prompts, settings)
    else:
        answer_one(model, tokenizer, prompts[0].tokens, settings)


def check_that_something_is_asked(settings: GenerationSettings) -> None:
    if settings.prompts_file is None and not settings.chat and not settings.prompt.strip():
        raise UserError('prompt: is empty; give prompt="...", prompts_file=questions.jsonl or chat=true')
    if settings.output_file is not None:
        check_output_file(settings.output_file)
    if settings.temperature == 0 and (settings.top_k is not None or settings.top_p is not None):
        say("warning: top_k and top_p have no effect at temperature 0", sys.stderr)


def tokenized_prompts(settings: GenerationSettings, tokenizer: ChatTransform, max_seq_len: int) -> list[FilePrompt]:
    """Tokenize the prompts of the file, or the one of the command line; none for a chat."""
    if settings.prompts_file is not None:
        column, base_column = answer_columns(settings)
        columns = [column, base_column] if settings.compare else [column]
        return read_prompts(settings.prompts_file, tokenizer, max_seq_len, columns)
    return [] if settings.chat else [one_prompt(settings.prompt, tokenizer, max_seq_len)]


def answer_columns(settings: GenerationSettings) -> tuple[str, str]:
    """Name the columns that the answers and the base's answers are written to."""
    return (ANSWER, BASE_ANSWER) if settings.num_answers == 1 else (ANSWERS, BASE_ANSWERS)


def load_model(settings: GenerationSettings, base: BaseCheckpoint, adapter: StoredAdapter | None) -> TransformerDecoder:
    device = resolved_device(settings.device)
    dtype, _ = resolved_dtype(settings.dtype, device)
    return load_model_for_inference(base, adapter, settings.quantize_base, dtype, device, settings.quantization)


def samplings(settings: GenerationSettings) -> list[Sampling]:
    """Say how each of the answers to a prompt is drawn: with its own seed."""
    drawing = settings.temperature, settings.top_k, settings.top_p, settings.repetition_penalty
    return [Sampling(*drawing, seed=settings.seed + number) for number in range(settings.num_answers)]


def answer_one(
    model: IncrementalLlama, tokenizer: ChatTransform, prompt: list[int], settings: GenerationSettings
) -> None:
    """Print the answers, on a terminal piece by piece; with `compare` the base's before them."""

    def print_answers(label: str = "") -> None:
        for number, sampling in enumerate(samplings(settings), start=1):
            print(label + (f"{number}  " if settings.num_answers > 1 else ""), end="", flush=True)
            for piece in streamed_answer(model, tokenizer, prompt, settings.max_new_tokens, sampling):
                print(piece, end="", flush=sys.stdout.isatty())
            print(flush=True)

    if not settings.compare:
        return print_answers()
    with disable_adapter(model):
        print_answers("base   ")
    return print_answers("tuned  ")


def answer_file(
    model: IncrementalLlama, tokenizer: ChatTransform, prompts: list[FilePrompt], settings: GenerationSettings
) -> None:
    """Write the answers beside their rows; with `compare` the base's as well."""

    def drawn(tokens: list[list[int]], sampling: Sampling) -> list[str]:
        answer_tokens = generate(
            model,
            tokens,
            max_new_tokens=settings.max_new_tokens,
            stop_tokens=tokenizer.stop_tokens,
            sampling=sampling,
        )
        return [tokenizer.decode(answer).strip() for answer in answer_tokens]

    def answers(tokens: list[list[int]]) -> list[str] | list[list[str]]:
        by_sampling = [drawn(tokens, sampling) for sampling in samplings(settings)]
        return by_sampling[0] if settings.num_answers == 1 else list(map(list, zip(*by_sampling, strict=True)))

    column, base_column = answer_columns(settings)

    def answer_batch(tokens: list[list[int]]) -> dict[str, list[str] | list[list[str]]]:
        if not settings.compare:
            return {column: answers(tokens)}
        with disable_adapter(model):
            base_answers = answers(tokens)
        return {column: answers(tokens), base_column: base_answers}

    assert settings.output_file is not None
    with tqdm(total=len(prompts), unit="prompt", disable=None) as progress:
        for num_answered in write_answers(prompts, settings.output_file, settings.batch_size, answer_batch):
            progress.update(num_answered)
    say(f"{len(prompts) * settings.num_answers} answers in {settings.output_file}")


if __name__ == "__main__":
    run_recipe(recipe_main)
