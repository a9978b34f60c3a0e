"""Prompt templates, and what is trained in each."""

import json

import pytest
from torchtune.data import AlpacaToMessages

from custom_components.datasets.chat import chat_dataset
from custom_components.datasets.preview_text import BRACKETS, spans_text
from custom_components.datasets.prompt_files import row_dialog
from custom_components.datasets.row_preview import row_spans
from custom_components.runtime.errors import UserError
from custom_components.transforms.chat_transform import prompt_tokens
from custom_components.transforms.dialogs import chat_messages
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.marked_template import MarkedTemplate
from custom_components.transforms.templates import prompt_template
from custom_components.transforms.turns import BOS, EOS, Turn
from tests.support.paths import TINY_TOKENIZER

DIALOG = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "No."},
]
OWN = {"system": "S: {content}\n", "user": "U: {content}\n", "assistant": "A: {content}\n"}


def shown(template, dialog=DIALOG, **settings):
    """The text of a dialog's tokens, supervised parts in brackets."""
    tokenizer = Llama2ChatTransform(TINY_TOKENIZER, prompt_template=template, **settings)
    row = tokenizer({"messages": dialog})
    labels = [-100 if masked else token for token, masked in zip(row["tokens"], row["mask"], strict=True)]
    return spans_text(row_spans(row["tokens"], labels, tokenizer), BRACKETS)


def test_human_response():
    assert shown("human_response", DIALOG[1:]) == (
        "⟨s⟩ ### HUMAN:\nOne?\n\n### RESPONSE:\n⟦Yes.⟨/s⟩⟧⟨s⟩ ### HUMAN:\nTwo?\n\n### RESPONSE:\n⟦No.⟨/s⟩⟧"
    )


def test_alpaca_brings_its_own_system_prompt():
    text = shown("alpaca", DIALOG[1:3])
    assert text.startswith("⟨s⟩ Below is an instruction that describes a task.")
    assert text.endswith("\n\n### Instruction:\nOne?\n\n### Response:\n⟦Yes.⟨/s⟩⟧")


def test_ones_own_template_and_a_space_at_the_seam():
    """The space before an answer belongs to the answer's first piece, as the tokenizer would join them."""
    assert shown(OWN) == "⟨s⟩ S: Be kind.\nU: One?\nA:⟦ Yes.\n⟨/s⟩⟧⟨s⟩ U: Two?\nA:⟦ No.\n⟨/s⟩⟧"


def test_none_leaves_the_text_alone():
    assert shown("none", [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]) == (
        "⟨s⟩ 2+2=⟦4⟨/s⟩⟧"
    )


def test_train_on():
    assert shown("human_response", DIALOG[1:], train_on="last_assistant").count("⟦") == 1
    assert shown("human_response", DIALOG[1:], train_on="last_assistant").endswith("⟦No.⟨/s⟩⟧")
    assert shown("human_response", DIALOG[1:3], train_on="all") == "⟨s⟩⟦ ### HUMAN:\nOne?\n\n### RESPONSE:\nYes.⟨/s⟩⟧"


def test_weight_zero_is_shown_and_not_trained():
    dialog = [DIALOG[1], {**DIALOG[2], "weight": 0}, DIALOG[3], {**DIALOG[4], "weight": 1}]
    for train_on in ("assistant", "last_assistant"):
        assert shown("human_response", dialog, train_on=train_on).count("⟦") == 1
    assert "⟦Yes" not in shown("human_response", dialog)


@pytest.mark.parametrize("template", ["llama2", "alpaca", "human_response", OWN])
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_the_prompt_of_inference_is_the_prompt_of_training(template, train_on):
    """L25: what generation gives the model is what training showed it, token for token, in every template."""
    tokenizer = Llama2ChatTransform(TINY_TOKENIZER, prompt_template=template, train_on=train_on)
    trained = tokenizer({"messages": DIALOG})["tokens"]
    prompt = tokenizer({"messages": DIALOG[:-1]}, inference=True)["tokens"]
    assert trained[: len(prompt)] == prompt
    answer = trained[len(prompt) :]
    assert tokenizer.decode(answer).strip() == "No." and answer[-1] == tokenizer.eos_id


def test_plain_text_is_trained_whole():
    template = prompt_template("llama2")
    from custom_components.transforms.dialogs import ChatMessage
    from custom_components.transforms.templates import dialog_turns

    assert dialog_turns([ChatMessage("text", "Once.")], template) == [Turn((BOS,), ("Once.", EOS))]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("vicunia", "'vicunia' is none of llama2, zephyr"),
        ({"user": "{content}"}, "needs user and assistant"),
        ({"user": "{content}", "assistant": "{content}", "tool": "x"}, "may have system and start"),
        ({"user": "no place", "assistant": "{content}"}, "prompt_template.user: 'no place'"),
    ],
)
def test_templates_that_are_none(template, words):
    with pytest.raises(UserError, match=words):
        prompt_template(template)


def test_system_part_stands_in_the_first_turn_only():
    turns = MarkedTemplate(**OWN)(chat_messages(DIALOG))
    assert ["S: " in turn.prompt for turn in turns] == [True, False]


ALPACA_ROWS = [
    {"instruction": "Translate.", "input": "Où?", "output": "Where?"},
    {"instruction": "Say it.", "input": "", "output": "It."},
    {"instruction": "{input} {instruction}", "input": "{content}\n", "output": "x"},
]


@pytest.mark.parametrize("row", ALPACA_ROWS)
def test_alpaca_is_stanfords_as_torchtune_writes_it(tmp_path, row):
    """With an input: the other preamble and `### Input:`. torchtune's own transform spells both."""
    prompt = AlpacaToMessages()(row)["messages"][0].text_content
    tokenizer = Llama2ChatTransform(TINY_TOKENIZER, prompt_template="alpaca")
    source = tmp_path / "rows.json"
    source.write_text(json.dumps([row]))
    tokens = chat_dataset(tokenizer, str(source))[0]["tokens"]
    assert tokens == tokenizer.encode(prompt + row["output"])
    question = row_dialog({key: row[key] for key in row})
    assert prompt_tokens(tokenizer, question, 1000) == tokenizer.encode(prompt, add_eos=False)


def test_an_input_is_joined_in_other_templates_and_kept_with_a_system_prompt(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(ALPACA_ROWS[0] | {"system": "Be."}) + "\n")
    for template, text in {
        "llama2": "[INST] <<SYS>>\nBe.\n<</SYS>>\n\nTranslate.\n\nOù? [/INST] Where? ",
        "alpaca": "Be.\n\n### Instruction:\nTranslate.\n\n### Input:\nOù?\n\n### Response:\nWhere?",
    }.items():
        tokenizer = Llama2ChatTransform(TINY_TOKENIZER, prompt_template=template)
        assert tokenizer.decode(chat_dataset(tokenizer, str(source))[0]["tokens"]) == text


def test_alpacas_own_text_with_an_input_is_read_back(tmp_path):
    tokenizer = Llama2ChatTransform(TINY_TOKENIZER, prompt_template="alpaca")
    text = AlpacaToMessages()(ALPACA_ROWS[0])["messages"][0].text_content + "Where?"
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"text": text}) + "\n")
    assert chat_dataset(tokenizer, str(source))[0]["tokens"] == tokenizer.encode(text)
