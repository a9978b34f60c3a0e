"""L1 to L6: what is trained on is exactly what Meta trained on."""

import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_components.datasets.batching import collate
from custom_components.datasets.chat import chat_dataset
from custom_components.datasets.row_formats import FORMATS
from custom_components.runtime.errors import UserError
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.templates import LLAMA2_TAGS
from tests.support.paths import TINY_TOKENIZER

PROCESSOR = sentencepiece.SentencePieceProcessor(model_file=str(TINY_TOKENIZER))
TRANSFORM = Llama2ChatTransform(TINY_TOKENIZER)

texts = st.text(max_size=30).filter(lambda text: not any(tag in text for tag in LLAMA2_TAGS) and "\x00" not in text)
dialogs = st.tuples(
    st.none() | texts,
    st.lists(st.tuples(texts, texts), min_size=1, max_size=4),
)


def as_messages(system: str | None, turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def metas_turns(system: str | None, turns: list[tuple[str, str]]) -> list[list[int]]:
    """Meta's rule, one `encode` call a turn: llama/generation.py @689c7f2."""
    encoded = []
    for index, (question, answer) in enumerate(turns):
        if index == 0 and system is not None:
            question = f"<<SYS>>\n{system}\n<</SYS>>\n\n{question}"
        text = f"[INST] {question.strip()} [/INST] {answer.strip()} "
        encoded.append([1, *PROCESSOR.encode(text), 2])
    return encoded


@settings(deadline=None)
@given(dialogs)
def test_L01_tokens_are_metas(dialog):
    tokens = TRANSFORM({"messages": as_messages(*dialog)})["tokens"]
    assert tokens == [token for turn in metas_turns(*dialog) for token in turn]


@settings(deadline=None)
@given(dialogs)
def test_L02_supervised_tokens_are_the_answers_and_their_eos(dialog):
    """Counted from the end of each turn: the answer, its closing space and EOS are what the prompt leaves over."""
    system, turns = dialog
    row = TRANSFORM({"messages": as_messages(system, turns)})
    expected = []
    for index, turn in enumerate(metas_turns(system, turns)):
        question = turns[index][0] if index or system is None else f"<<SYS>>\n{system}\n<</SYS>>\n\n{turns[0][0]}"
        num_prompt = 1 + len(PROCESSOR.encode(f"[INST] {question.strip()} [/INST]"))
        expected += [True] * num_prompt + [False] * (len(turn) - num_prompt)
    assert row["mask"] == expected


@settings(deadline=None)
@given(dialogs)
def test_L03_one_bos_a_turn_and_control_tokens_in_text_stay_text(dialog):
    system, turns = dialog
    turns = [(f"{question} <s> </s>", f"</s> {answer} <s>") for question, answer in turns]
    tokens = TRANSFORM({"messages": as_messages(system, turns)})["tokens"]
    assert tokens.count(1) == tokens.count(2) == len(turns)


def test_L03_one_bos_a_turn_where_the_row_holds_it():
    row = {"text": "<s>[INST] a [/INST] b </s><s>[INST] c [/INST] d </s>"}
    messages = FORMATS["llama2_text"].convert(row)
    tokens, _ = TRANSFORM.encode_turns([TRANSFORM.render(messages)])[0]
    assert tokens.count(1) == tokens.count(2) == 2
    assert tokens == TRANSFORM({"messages": as_messages(None, [("a", "b"), ("c", "d")])})["tokens"]


def test_L04_eos_is_supervised_and_nothing_is_padded():
    """Rows of different lengths share a forward without a padding token, so no id has to be masked for being one."""
    rows = [TRANSFORM({"messages": as_messages(None, [("hi", "x" * length)])}) for length in (1, 9)]
    dataset_rows = [
        {"tokens": row["tokens"], "labels": [-100 if m else t for t, m in zip(row["tokens"], row["mask"], strict=True)]}
        for row in rows
    ]
    batch = collate(dataset_rows)
    assert batch.tokens_1T.tolist()[0] == rows[0]["tokens"] + rows[1]["tokens"]
    assert (batch.labels_1T == 2).sum() == 2


@settings(deadline=None)
@given(dialogs, st.integers(min_value=8, max_value=60))
def test_L05_a_truncated_row_gets_no_eos(dialog, max_seq_len):
    transform = Llama2ChatTransform(TINY_TOKENIZER, max_seq_len=max_seq_len)
    whole = TRANSFORM({"messages": as_messages(*dialog)})
    cut = transform({"messages": as_messages(*dialog)})
    assert cut["tokens"] == whole["tokens"][:max_seq_len]
    assert cut["mask"] == whole["mask"][:max_seq_len]


def write_rows(path, *dialogs_of_rows):
    path.write_text("".join(json.dumps({"messages": as_messages(None, turns)}) + "\n" for turns in dialogs_of_rows))
    return str(path)


def test_L05_truncated_rows_are_counted(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [("hi", "yes " * 40)], [("hi", "no")])
    dataset = chat_dataset(Llama2ChatTransform(TINY_TOKENIZER, max_seq_len=24), source)
    assert dataset.summaries[0].num_truncated == 1
    assert dataset.lengths[0] == 24
    assert dataset[0]["tokens"][-1] != 2 and dataset[1]["tokens"][-1] == 2


def test_L06_rows_without_a_supervised_token_are_dropped_and_counted(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [("long question " * 40, "yes")], [("hi", "no")])
    dataset = chat_dataset(Llama2ChatTransform(TINY_TOKENIZER, max_seq_len=24), source)
    [summary] = dataset.summaries
    assert (summary.num_rows, summary.num_kept, summary.num_unsupervised) == (2, 1, 1)


def test_L06_a_set_without_a_supervised_token_is_an_error_that_shows_a_row(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [("long question " * 40, "yes")])
    with pytest.raises(UserError, match=r"\[INST\] long question"):
        chat_dataset(Llama2ChatTransform(TINY_TOKENIZER, max_seq_len=24), source)
