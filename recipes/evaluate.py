"""How well a model, and an adapter on it, predict and answer the rows of a data set, and solve lm-eval's tasks.

tune run recipes/evaluate.py --config configs/evaluate.yaml checkpoint_dir=... adapter_dir=... dataset.source=...
"""

import contextlib
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import disable_adapter

from custom_components.config.components import instantiate
from custom_components.config.reading import load_settings
from custom_components.config.task_settings import EvaluationSettings
from custom_components.datasets.summary import account
from custom_components.datasets.tokenized_rows import ChatDataset, split_validation
from custom_components.evaluation.answers import (
    Question,
    answer_measures,
    generated_answers,
    held_out_questions,
    rouge_scorer,
)
from custom_components.evaluation.report import Measures, results_file, results_table
from custom_components.evaluation.scores import scores_by_source
from custom_components.runs.origin import ValidationDraw, open_origin
from custom_components.runtime.devices import resolved_device, resolved_dtype
from custom_components.runtime.errors import UserError, run_recipe
from custom_components.runtime.terminal import say
from custom_components.transforms.chat_transform import ChatTransform
from custom_components.transforms.prompt_format import stated_prompt_format, tokenizer_with_format
from custom_components.transforms.tokenizer_fitting import fit_tokenizer
from custom_components.weights.adapted_model import load_model_for_inference, model_for_adapter
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.checkpoint_files import open_checkpoint
from custom_components.weights.checkpoint_loading import base_format

if TYPE_CHECKING:  # lm-eval is an extra
    from custom_components.evaluation.lm_eval import LoadedTasks


def recipe_main() -> None:
    settings = load_settings(EvaluationSettings, sys.argv[1:])
    device = resolved_device(settings.device)
    dtype, dtype_words = resolved_dtype(settings.dtype, device)
    with results_file(settings.output_file) as results:
        base = open_checkpoint(settings.checkpoint_dir)
        adapter = open_adapter(settings.adapter_dir) if settings.adapter_dir else None
        tokenizer = trained_tokenizer(settings)
        tokenizer = fit_tokenizer(tokenizer, model_for_adapter(base, adapter))
        dataset = rows_to_evaluate(settings, tokenizer)
        questions = questions_to_answer(settings, dataset, tokenizer)
        tasks = tasks_to_solve(settings)

        model = load_model_for_inference(base, adapter, settings.quantize_base, dtype, device, settings.quantization)
        format = base_format(model)
        say(f"device {device}, dtype {dtype_words}{f'; the base in {format}' if format else ''}")
        rows: dict[str, dict[str, Measures]] = {}
        answers: dict[str, list[str]] = {}
        solved: dict[str, Mapping[str, Measures]] = {}
        for name, is_switched in models_to_compare(settings, model).items():
            with is_switched:
                if dataset is not None:
                    scores = scores_by_source(model, dataset, settings.batch_size, device)
                    rows[name] = {source: source_scores.measures for source, source_scores in scores.items()}
                if questions:
                    answers[name] = generated_answers(
                        model,
                        tokenizer,
                        questions,
                        batch_size=settings.batch_size,
                        max_new_tokens=settings.max_new_tokens,
                    )
                if tasks is not None:
                    solved[name] = solved_tasks(tasks, settings, model, tokenizer, device)

        answered = {name: {"answers": answer_measures(texts, questions)} for name, texts in answers.items()}
        subjects = by_subject(rows) | by_subject(answered) | by_subject(solved)
        print(results_table(subjects))
        results |= {
            "checkpoint_dir": str(settings.checkpoint_dir),
            "adapter_dir": str(settings.adapter_dir) if settings.adapter_dir else None,
            "quantize_base": settings.quantize_base,
            "quantization": settings.quantization,
            "dtype": str(dtype).removeprefix("torch."),
            "results": subjects,
            "answers": answer_records(tokenizer, questions, answers),
        }
    if settings.output_file is not None:
        say(f"results {settings.output_file}")


def trained_tokenizer(settings: EvaluationSettings) -> ChatTransform:
    """Make the tokenizer with the prompt format that the adapter was trained with."""
    trained = stated_prompt_format(settings.checkpoint_dir, settings.adapter_dir)
    tokenizer = tokenizer_with_format(
        settings.checkpoint_dir,
        trained,
        settings.adapter_dir,
        prompt_template=settings.prompt_template,
        system_prompt=settings.system_prompt,
    ).replace(max_seq_len=settings.max_seq_len)
    if settings.val_fraction is not None:
        draw = ValidationDraw(
            settings.val_fraction,
            settings.seed,
            settings.on_overlong,
            settings.on_uneven_turns,
            settings.on_empty_answer,
            settings.max_seq_len,
            None if settings.prompt_template is None else tokenizer.prompt_template,
            settings.system_prompt,
        )
        return open_origin(settings.adapter_dir or settings.checkpoint_dir).validation_tokenizer(
            tokenizer, draw, trained
        )
    return tokenizer


def rows_to_evaluate(settings: EvaluationSettings, tokenizer: ChatTransform) -> ChatDataset | None:
    if settings.dataset is None:
        return None
    dataset = instantiate(settings.dataset, tokenizer=tokenizer)
    say(account(dataset.summaries))
    if settings.val_fraction is None:
        return dataset
    _, dataset = split_validation(dataset, settings.val_fraction, settings.seed)
    say(
        f"{len(dataset)} rows are drawn, which training on this data with val_fraction {settings.val_fraction}, seed "
        f"{settings.seed}, max_seq_len {tokenizer.max_seq_len} and train_on {tokenizer.train_on} kept for validation"
    )
    return dataset


def questions_to_answer(
    settings: EvaluationSettings, dataset: ChatDataset | None, tokenizer: ChatTransform
) -> list[Question]:
    if dataset is None or settings.generate_answers == 0:
        return []
    rouge_scorer()  # before the model is loaded: an extra that may not be installed
    return held_out_questions(dataset, tokenizer, settings.generate_answers)


def tasks_to_solve(settings: EvaluationSettings) -> "LoadedTasks | None":
    if not settings.tasks:
        return None
    try:
        from custom_components.evaluation.lm_eval import LoadedTasks
    except ImportError:
        raise UserError("tasks: need the package lm-eval; pip install -e '.[eval]'") from None
    return LoadedTasks(settings.tasks)


def models_to_compare(
    settings: EvaluationSettings, model: TransformerDecoder
) -> dict[str, AbstractContextManager[Any]]:
    """Name what to evaluate, each with a context in which the model is that."""
    if settings.adapter_dir is None:
        return {"base": contextlib.nullcontext()}
    tuned: dict[str, AbstractContextManager[Any]] = {"tuned": contextlib.nullcontext()}
    return {"base": disable_adapter(model), **tuned} if settings.compare else tuned


def solved_tasks(
    tasks: "LoadedTasks",
    settings: EvaluationSettings,
    model: TransformerDecoder,
    tokenizer: ChatTransform,
    device: torch.device,
) -> Mapping[str, Measures]:
    from custom_components.evaluation.lm_eval import LlamaLM, task_measures

    return task_measures(
        tasks,
        LlamaLM(model, tokenizer, batch_size=settings.batch_size, device=device),
        num_fewshot=settings.num_fewshot,
        max_rows=settings.max_task_rows,
        apply_chat_template=settings.apply_chat_template,
    )


def by_subject(measures: Mapping[str, Mapping[str, Measures]]) -> dict[str, dict[str, Measures]]:
    """Regroup measures by model, then subject, as by subject, then model, so that compared ones are together."""
    subjects: dict[str, dict[str, Measures]] = {}
    for model, by_name in measures.items():
        for subject, subject_measures in by_name.items():
            subjects.setdefault(subject, {})[model] = subject_measures
    return subjects


def answer_records(
    tokenizer: ChatTransform, questions: list[Question], answers: Mapping[str, list[str]]
) -> list[dict[str, str]]:
    """Record every question as the model saw it, with the row's answer and each model's."""
    return [
        {"prompt": tokenizer.text_of_pieces(question.prompt), "reference": question.reference}
        | {model: texts[index] for model, texts in answers.items()}
        for index, question in enumerate(questions)
    ]


if __name__ == "__main__":
    run_recipe(recipe_main)
