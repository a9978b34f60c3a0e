"""Files of prompts: rows in, the same rows with their answers out, as JSONL and in the same order."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from custom_components.datasets.file_readers import Row
from custom_components.datasets.row_formats import FORMATS, recognised_format, spelled_as_ours
from custom_components.datasets.row_messages import listed
from custom_components.datasets.sources import read_rows
from custom_components.runtime.disk_errors import disk_errors_of
from custom_components.runtime.errors import UserError
from custom_components.transforms.chat_transform import ChatTransform, prompt_tokens
from custom_components.transforms.dialogs import ChatMessage

ANSWER, BASE_ANSWER = "answer", "answer_base"
ANSWERS, BASE_ANSWERS = "answers", "answers_base"  # lists, where more than one is drawn
# A window of this many batches is sorted by length, so that rows of similar length share a batch.
_NUM_BATCHES_SORTED = 8
_ANSWER_THAT_IS_LEFT_OUT = "-"


def check_output_file(path: Path) -> None:
    """Refuse an output file that cannot be created.

    Raises:
        UserError: it exists already, its directory does not exist, or it cannot be written.
    """
    try:
        if not path.parent.is_dir():
            raise UserError(f"output_file: there is no directory {str(path.parent)!r}")
        path.touch(exist_ok=False)
        path.unlink()
    except FileExistsError:
        raise UserError(f"output_file: {str(path)!r} exists already; delete it or name another") from None
    except OSError as error:
        raise UserError(f"output_file: {str(path)!r} cannot be written ({error.strerror}); name another") from None


@dataclass(frozen=True)
class FilePrompt:
    """A row, and the tokens of its prompt."""

    row: Row
    tokens: list[int]


def read_prompts(
    path: Path, tokenizer: ChatTransform, max_seq_len: int, answer_columns: Sequence[str]
) -> list[FilePrompt]:
    """Read and check all prompts of a file, before the first is answered.

    Args:
        path: rows with `prompt` (and `system`), with `messages`, or in any format for training; an answer at the end of
            a row is not shown to the model.
        max_seq_len: the model's context.
        answer_columns: the columns that will be added to the rows.

    Raises:
        UserError: there is no such file, or a row has no prompt, leaves no room for an answer, or already has one of
            `answer_columns`: every bad row by file and line, up to ten.
    """
    if not path.exists():
        raise UserError(f"prompts_file: there is no file {str(path)!r}")
    prompts: list[FilePrompt] = []
    problems: list[str] = []
    try:
        for row in read_rows(str(path), key="prompts_file", on_bad_row=lambda error: problems.append(str(error))):
            try:
                if taken := set(answer_columns) & set(row.values):
                    raise ValueError(f"has {sorted(taken)[0]!r} already, under which the answer is written; rename it")
                prompts.append(FilePrompt(row, prompt_tokens(tokenizer, row_dialog(row.values), max_seq_len)))
            except ValueError as error:
                problems.append(f"{row.location}: {error}")
    except UserError as error:  # a problem of the whole file is reported after those of its rows
        raise UserError(*problems[:9], *error.messages) from None
    if problems:
        raise UserError(*problems[:10])
    return prompts


def one_prompt(text: str, tokenizer: ChatTransform, max_seq_len: int) -> FilePrompt:
    """Tokenize a single prompt, not from a file.

    Raises:
        UserError: it leaves no room for an answer, or contains one of the template's own marks.
    """
    values = {"prompt": text}
    try:
        return FilePrompt(Row(values, "prompt"), prompt_tokens(tokenizer, row_dialog(values), max_seq_len))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"prompt: {error}") from None


def row_dialog(values: Mapping[str, Any]) -> list[ChatMessage]:
    """Read a row's dialog up to the question to answer, as it would be trained.

    Raises:
        ValueError: the row has no question.
    """
    values = spelled_as_ours(values, FORMATS)
    if "prompt" in values:
        values = {**values, "completion": _ANSWER_THAT_IS_LEFT_OUT}
    try:
        row_format = recognised_format(values, values)
    except ValueError:
        raise ValueError(f"has no question in {listed(values)}; name it 'prompt', or give 'messages'") from None
    return row_format.asked(dict(values))


def write_answers(
    prompts: Sequence[FilePrompt],
    output_file: Path,
    batch_size: int,
    answer_batch: Callable[[list[list[int]]], Mapping[str, Sequence[Any]]],
) -> Iterator[int]:
    """Answer all prompts; yields the number answered since the last time.

    Rows are written in the file's order as soon as all before them are answered, so after an interruption the file has
    whole rows.

    Args:
        output_file: see :func:`check_output_file`.
        answer_batch: takes the tokens of up to `batch_size` prompts and returns the columns to add.
    """
    remaining = iter(prompts)
    # Half a surrogate pair in another column is written as a JSON escape, as it was read.
    advice = "free space there; the answers so far are in the file"
    with (
        disk_errors_of("output_file", output_file, advice),
        output_file.open("x", encoding="utf-8", errors="backslashreplace") as file,
    ):
        while window := list(islice(remaining, batch_size * _NUM_BATCHES_SORTED)):
            by_length = sorted(range(len(window)), key=lambda index: -len(window[index].tokens))
            answered: dict[int, dict[str, Any]] = {}
            num_written = 0
            for start in range(0, len(window), batch_size):
                indices = by_length[start : start + batch_size]
                columns = answer_batch([window[index].tokens for index in indices])
                for position, index in enumerate(indices):
                    answered[index] = {name: texts[position] for name, texts in columns.items()}
                while num_written in answered:
                    values = window[num_written].row.values | answered[num_written]
                    file.write(json.dumps(values, ensure_ascii=False, default=str) + "\n")
                    num_written += 1
                file.flush()
                yield len(indices)
