"""Results of evaluations as evaluate.py has written them, read back to be compared."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from custom_components.evaluation.report import RESULTS_KEYS
from custom_components.runtime.errors import UserError


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question, the right answer, and the evaluated model's.

    Attributes:
        prompt: as the model saw it.
    """

    prompt: str
    reference: str
    answer: str


@dataclass(frozen=True)
class StoredAnswers:
    """The answers of an evaluation with `generate_answers`.

    Attributes:
        path: of the file of results.
        weights_dir: of the adapter that was evaluated, or else of the model.
        exact_match: the share of answers that are the right one, character for character.
    """

    path: Path
    weights_dir: Path
    exact_match: float
    questions: Sequence[AnsweredQuestion]

    @property
    def words(self) -> str:
        return f"{self.exact_match:.1%} of {len(self.questions)}"

    def are_of(self, weights_dir: Path) -> bool:
        """Tell whether these trained weights gave the answers."""
        return self.weights_dir.resolve() == weights_dir.resolve()

    def are_outdated(self) -> bool:
        """Tell whether the weights were written after the results: then they are not those that were evaluated."""
        written = [file.stat().st_mtime for file in self.weights_dir.glob("*.safetensors")]
        return max(written, default=0.0) > self.path.stat().st_mtime


def read_answers(path: Path) -> StoredAnswers | None:
    """Read the answers in a file of results; None if it is not one, or has no answers."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        return _answers(path, results) if results.keys() >= RESULTS_KEYS else None
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def open_answers(path: Path) -> StoredAnswers:
    """Read the answers in a file that the key `evaluations` names.

    Raises:
        UserError: it is not there, not results of evaluate.py, or without answers.
    """
    if not path.is_file():
        raise UserError(f"evaluations: {str(path)!r} is not a file; name what evaluate.py wrote as its output_file")
    answers = read_answers(path)
    if answers is None:
        raise UserError(
            f"evaluations: {str(path)!r} has no answers of an evaluation; name the output_file of evaluate.py with "
            "generate_answers=100"
        )
    return answers


def _answers(path: Path, results: Mapping[str, Any]) -> StoredAnswers | None:
    if not results["answers"]:
        return None
    model, weights_dir = (
        ("tuned", results["adapter_dir"]) if results["adapter_dir"] else ("base", results["checkpoint_dir"])
    )
    questions = [
        AnsweredQuestion(str(row["prompt"]), str(row["reference"]), str(row[model])) for row in results["answers"]
    ]
    exact_match = float(results["results"]["answers"][model]["exact_match"])
    return StoredAnswers(path, Path(weights_dir), exact_match, questions)
