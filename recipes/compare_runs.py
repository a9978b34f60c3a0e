"""Compare training runs: what differs between them, what each took, how well it learned, what it answers.

tune run recipes/compare_runs.py --config configs/compare_runs.yaml run_dirs=[outputs/a,outputs/b] output_file=page.html
"""

import itertools
import sys
from collections.abc import Mapping, Sequence

from custom_components.config.reading import load_settings
from custom_components.config.task_settings import ComparisonSettings
from custom_components.evaluation.stored_results import StoredAnswers, open_answers, read_answers
from custom_components.runs.comparison import ABSENT, TableRow, difference_rows, measure_rows
from custom_components.runs.comparison_page import ComparisonPage, comparison_page_file
from custom_components.runs.comparison_table import comparison_table
from custom_components.runs.recorded_run import RecordedRun, open_recorded_runs
from custom_components.runtime.errors import UserError, run_recipe
from custom_components.runtime.terminal import say

NUM_QUESTIONS_SHOWN = 8


def recipe_main() -> None:
    settings = load_settings(ComparisonSettings, sys.argv[1:])
    with comparison_page_file(settings.output_file) as page:
        runs = open_recorded_runs(settings.run_dirs)
        answered = answers_of_runs(runs, [open_answers(path) for path in settings.evaluations])
        names = [run.name for run in runs]
        differences, measures = difference_rows(runs), measure_rows(runs)
        if answered:
            measures.append(exact_match_row(runs, answered))
        if len(runs) > 1 and not differences:
            say("the configs of these runs do not differ")
        print(comparison_table(names, [*differences, *measures]))
        page.add_curves(runs)
        page.add_table(names, differences, measures)
        show_samples(page, runs)
        show_questions(page, answered)
    if settings.output_file is not None:
        say(f"page {settings.output_file}")


def answers_of_runs(runs: Sequence[RecordedRun], named: Sequence[StoredAnswers]) -> dict[str, StoredAnswers]:
    """Find the newest evaluation with answers of each run, among those named and those in its directory.

    Returns:
        by the run's name; runs that were not evaluated so are left out.

    Raises:
        UserError: one that is named is of none of the runs.
    """
    for answers in named:
        if not any(answers.are_of(run.result) for run in runs):
            raise UserError(
                f"evaluations: {str(answers.path)!r} is of {str(answers.weights_dir)!r}, which is of none of the runs; "
                "leave it out, or name its run in run_dirs"
            )
    found: dict[str, StoredAnswers] = {}
    for run in runs:
        beside = map(read_answers, sorted(run.path.glob("*.json")))
        of_run = [answers for answers in (*named, *beside) if answers is not None and answers.are_of(run.result)]
        for outdated in filter(StoredAnswers.are_outdated, of_run):
            say(f"{outdated.path}: older than {run.result}, so not shown; evaluate again")
        if current := list(itertools.filterfalse(StoredAnswers.are_outdated, of_run)):
            found[run.name] = max(current, key=lambda answers: answers.path.stat().st_mtime)
    return found


def exact_match_row(runs: Sequence[RecordedRun], answered: Mapping[str, StoredAnswers]) -> TableRow:
    cells = (answered[run.name].words if run.name in answered else ABSENT for run in runs)
    return TableRow("answers' exact match", tuple(cells))


def show_samples(page: ComparisonPage, runs: Sequence[RecordedRun]) -> None:
    """Show the runs' answers to their `sample_prompts` side by side."""
    page.add_heading("Sample answers")
    samples = {run.name: run.shown_samples() for run in runs}
    prompts = dict.fromkeys(prompt for _, answers in samples.values() for prompt in answers)
    if not prompts:
        page.add_words("None: the runs had no sample_prompts, or were not validated.")
    for prompt in prompts:
        answers = {
            f"{name}, after step {step}": by_prompt[prompt]
            for name, (step, by_prompt) in samples.items()
            if prompt in by_prompt
        }
        page.add_answers(prompt, answers)


def show_questions(page: ComparisonPage, answered: Mapping[str, StoredAnswers]) -> None:
    """Show questions of the evaluations with the right answer and each run's, first those that a run got wrong."""
    if not answered:
        return
    page.add_heading("Questions of the evaluations, those that a run got wrong first")
    by_question: dict[tuple[str, str], dict[str, str]] = {}
    for name, answers in answered.items():
        for question in answers.questions:
            by_question.setdefault((question.prompt, question.reference), {})[name] = question.answer
    ordered = sorted(by_question.items(), key=lambda item: {*item[1].values()} == {item[0][1]})
    for (prompt, reference), by_run in ordered[:NUM_QUESTIONS_SHOWN]:
        page.add_answers(prompt, {"the right answer": reference, **by_run})


if __name__ == "__main__":
    run_recipe(recipe_main)
