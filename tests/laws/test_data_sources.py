"""L27: a path is enough, the format is recognised and said, a bad record is named by file and line."""

import json

import pytest

from custom_components.datasets.chat import chat_dataset
from custom_components.runtime.errors import UserError

TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]
ROWS = {
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Nobody."}]},
    "alpaca": {"instruction": "Who?", "input": "", "output": "Nobody."},
    "prompt_completion": {"prompt": "Who?", "completion": "Nobody."},
    "llama2_text": {"text": "<s>[INST] Who? [/INST] Nobody. </s>"},
    "marked_text": {"text": "### Human: Who?\n### Assistant: Nobody."},
}


def write(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("name", ROWS)
def test_L27_every_spelling_of_a_dialog_gives_its_tokens_and_is_named(tmp_path, tiny_tokenizer, name, suffix):
    dataset = chat_dataset(tiny_tokenizer, write(tmp_path / f"rows{suffix}", [ROWS[name]]))
    assert dataset[0]["tokens"] == tiny_tokenizer({"messages": TURNS})["tokens"]
    assert f"({name})" in str(dataset.summaries[0])


def test_L27_plain_text_is_trained_whole_and_said(tmp_path, tiny_tokenizer):
    dataset = chat_dataset(tiny_tokenizer, write(tmp_path / "rows.jsonl", [{"text": "Once."}]))
    assert all(label >= 0 for label in dataset[0]["labels"][1:])
    assert "(text)" in str(dataset.summaries[0])


@pytest.mark.parametrize("name", ["messages", "sharegpt", "alpaca", "prompt_completion", "llama2_text"])
def test_L27_a_bad_record_is_named_by_file_and_line(tmp_path, tiny_tokenizer, name):
    bad = dict.fromkeys(ROWS[name])
    source = write(tmp_path / "rows.jsonl", [ROWS[name], ROWS[name], bad])
    with pytest.raises(UserError, match=r"rows\.jsonl:3: "):
        chat_dataset(tiny_tokenizer, source)


def test_L27_columns_of_no_format_are_listed(tmp_path, tiny_tokenizer):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*'frage'.*column_map"):
        chat_dataset(tiny_tokenizer, write(tmp_path / "rows.jsonl", [{"frage": "Wer?", "antwort": "Niemand."}]))
