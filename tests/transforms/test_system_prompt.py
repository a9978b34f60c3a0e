"""Which of the system prompts that are given a dialog gets: the order of `Llama2ChatTransform.with_system_prompt`."""

import json
import shutil

import pytest

from custom_components.datasets.chat import chat_dataset
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.prompt_format import PromptFormat, tokenizer_with_format
from tests.support.paths import TINY_TOKENIZER

QUESTION = {"role": "user", "content": "Where?"}
ANSWER = {"role": "assistant", "content": "Here."}


def system_part(tokens, tokenizer):
    """The system prompt in tokens of the template "alpaca", or in those of "none" what is before the question."""
    text = tokenizer.text_of_pieces(tokens).removeprefix("<s> ")
    return text.partition("### Instruction:")[0].partition("Where?")[0].removesuffix("\n\n")


@pytest.mark.parametrize("template", ["alpaca", "none"])
@pytest.mark.parametrize(
    ("of_row", "of_dataset", "of_tokenizer"),
    [
        ("row", "dataset", "tokenizer"),
        ("row", None, None),
        (None, "dataset", "tokenizer"),
        (None, None, "tokenizer"),
        (None, "", "tokenizer"),
        (None, None, ""),
        (None, None, None),
    ],
)
def test_a_row_of_training(tmp_path, template, of_row, of_dataset, of_tokenizer):
    source = tmp_path / "rows.jsonl"
    own = [] if of_row is None else [{"role": "system", "content": of_row}]
    source.write_text(json.dumps({"messages": [*own, QUESTION, ANSWER]}))
    tokenizer = Llama2ChatTransform(TINY_TOKENIZER, system_prompt=of_tokenizer, prompt_template=template)
    [row] = chat_dataset(tokenizer, str(source), system_prompt=of_dataset)
    of_template = "Below is an instruction" if template == "alpaca" else ""
    given = [prompt for prompt in (of_row, of_dataset, of_tokenizer, of_template) if prompt is not None]
    found = system_part(row["tokens"], tokenizer)
    assert found.startswith(given[0]) if given[0] is of_template else found == given[0]

    # What asks the adapter, and the rows of dataset_val, get the prompt that its training rows got.
    asking = tokenizer.with_system_prompt(of_dataset)
    if of_row is None:
        assert asking({"messages": [QUESTION, ANSWER]})["tokens"] == row["tokens"]


@pytest.mark.parametrize("template", ["alpaca", "none"])
@pytest.mark.parametrize(
    ("of_dialog", "of_command", "of_adapter"),
    [
        ("dialog", "command", "adapter"),
        (None, "command", "adapter"),
        (None, None, "adapter"),
        (None, "", "adapter"),
        (None, None, ""),
    ],
)
def test_a_question_to_an_adapter(tmp_path, template, of_dialog, of_command, of_adapter):
    shutil.copy(TINY_TOKENIZER, tmp_path / "tokenizer.model")
    trained = PromptFormat(template, of_adapter, ["</s>"])
    tokenizer = tokenizer_with_format(tmp_path, trained, system_prompt=of_command)
    own = [] if of_dialog is None else [{"role": "system", "content": of_dialog}]
    tokens = tokenizer({"messages": [*own, QUESTION]}, inference=True)["tokens"]
    expected = next(prompt for prompt in (of_dialog, of_command, of_adapter) if prompt is not None)
    assert system_part(tokens, tokenizer) == expected
