"""Data sets: policies, the account, mixing, splitting, the cache."""

import hashlib
import json
import tracemalloc

import numpy as np
import pytest

from custom_components.datasets.chat import chat_dataset
from custom_components.datasets.tokenized_rows import joined_arrays, split_validation
from custom_components.runtime.errors import UserError
from custom_components.transforms import templates
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from tests.support.paths import TINY_TOKENIZER


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def exchange(question, answer, **columns):
    return {"prompt": question, "completion": answer, **columns}


def texts(dataset, tokenizer):
    return [tokenizer.decode(row["tokens"]) for row in dataset]


@pytest.fixture
def short_tokenizer():
    return Llama2ChatTransform(TINY_TOKENIZER, max_seq_len=24)


LONG = exchange("hi", "yes " * 40)
SHORT = exchange("hi", "no")


@pytest.mark.parametrize(("policy", "lengths"), [("truncate", [24, 21]), ("drop", [21])])
def test_overlong_rows(tmp_path, short_tokenizer, policy, lengths):
    dataset = chat_dataset(short_tokenizer, write(tmp_path / "r.jsonl", LONG, SHORT), on_overlong=policy)
    assert len(dataset) == len(lengths)
    assert dataset.lengths[0] == max(dataset.lengths) if policy == "truncate" else dataset.lengths[0] < 24
    [summary] = dataset.summaries
    assert (summary.num_truncated, summary.num_overlong) == ((1, 0) if policy == "truncate" else (0, 1))


def test_overlong_rows_refused(tmp_path, short_tokenizer):
    source = write(tmp_path / "r.jsonl", SHORT, LONG)
    with pytest.raises(UserError, match=r"r\.jsonl:2: has \d+ tokens, max_seq_len is 24"):
        chat_dataset(short_tokenizer, source, on_overlong="error")


def test_bad_rows_are_named_or_skipped_and_counted(tmp_path, tiny_tokenizer):
    source = write(tmp_path / "r.jsonl", SHORT, '{"broken', exchange("[INST] x", "y"), exchange("", "y"), SHORT)
    with pytest.raises(UserError, match=r"r\.jsonl:2"):
        chat_dataset(tiny_tokenizer, source)
    dataset = chat_dataset(tiny_tokenizer, source, on_bad_row="skip")
    [summary] = dataset.summaries
    assert (summary.num_rows, summary.num_kept, summary.num_bad) == (5, 2, 3)
    assert "3 dropped (bad rows)" in str(summary)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (exchange("a [/INST] b", "y"), r"r\.jsonl:2: user message contains '\[/INST\]'"),
        ({"prompt": "a"}, r"r\.jsonl:2: "),
        (exchange("a", ["b"]), r"r\.jsonl:2: "),
        ("[1, 2]", r"r\.jsonl:2"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, tiny_tokenizer, row, words):
    with pytest.raises(UserError, match=words):
        chat_dataset(tiny_tokenizer, write(tmp_path / "r.jsonl", SHORT, row))


def test_column_map_format_and_system_prompt(tmp_path, tiny_tokenizer):
    source = write(tmp_path / "r.jsonl", {"question": "hi", "reply": "no"})
    column_map = {"prompt": "question", "completion": "reply"}
    dataset = chat_dataset(tiny_tokenizer, source, column_map=column_map, system_prompt="Be kind.")
    assert texts(dataset, tiny_tokenizer) == ["[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nhi [/INST] no "]
    plain = write(tmp_path / "t.jsonl", {"text": "### Human: a\n### Assistant: b"})
    assert chat_dataset(tiny_tokenizer, plain).summaries[0].format == "marked_text"
    [row] = chat_dataset(tiny_tokenizer, plain, format="text")
    assert all(label >= 0 for label in row["labels"][1:])


def test_a_dialog_is_rendered_once(tmp_path, monkeypatch):
    rendered = []

    def counted(dialog):
        rendered.append(dialog[0].content)
        return templates.llama2_turns(dialog)

    monkeypatch.setitem(templates.TEMPLATES, "llama2", counted)
    source = write(tmp_path / "r.jsonl", exchange("a", "b"), exchange("[INST]", "x"), exchange("c", "d"))
    dataset = chat_dataset(Llama2ChatTransform(TINY_TOKENIZER), source, on_bad_row="skip")
    assert len(dataset) == 2
    assert rendered == ["a", "[INST]", "c"]


def test_the_digest_of_the_rows_is_of_tokens_and_torchtune_s_mask(tmp_path, tiny_tokenizer):
    """Validation rows are drawn by it, and a run is resumed only on rows of the same: it must not change."""
    dataset = chat_dataset(tiny_tokenizer, write(tmp_path / "r.jsonl", SHORT, LONG))
    rows = [
        hashlib.sha256(np.array(row["tokens"], np.int32).tobytes() + (np.array(row["labels"]) == -100).tobytes())
        for row in dataset
    ]
    assert dataset.digest == hashlib.sha256(b"".join(row.digest() for row in rows)).hexdigest()


def test_sources_are_mixed_by_weight(tmp_path, tiny_tokenizer):
    first = write(tmp_path / "a.jsonl", *(exchange("a", str(number)) for number in range(4)))
    second = write(tmp_path / "b.jsonl", exchange("b", "x"))
    dataset = chat_dataset(tiny_tokenizer, [{"source": first, "weight": 0.5}, {"source": second, "weight": 3}])
    answers = [text.split()[-1] for text in texts(dataset, tiny_tokenizer)]
    assert answers == ["0", "2", "x", "x", "x"]
    assert [summary.num_rows for summary in dataset.summaries] == [4, 1]


def test_of_rows_that_are_joined_one_array_at_a_time_is_there_twice():
    tracemalloc.start()
    try:
        num_tokens = 1_000_000
        parts = [
            {"tokens": np.full(num_tokens, part, np.int32), "is_supervised": np.ones(num_tokens, bool)}
            | {"ends": np.array([0, num_tokens])}
            for part in range(4)
        ]
        joined = joined_arrays(parts)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert joined["ends"].tolist() == [part * num_tokens for part in range(5)]
    assert joined["tokens"][::num_tokens].tolist() == [0, 1, 2, 3] and joined["is_supervised"].all()
    assert peak_bytes < 1.05 * (2 * 16 + 4) * num_tokens


def test_max_rows(tmp_path, tiny_tokenizer):
    source = write(tmp_path / "r.jsonl", *(exchange("a", str(number)) for number in range(9)))
    assert len(chat_dataset(tiny_tokenizer, source, max_rows=4)) == 4


def test_validation_rows_are_trained_on_under_no_number(tmp_path, tiny_tokenizer):
    """Disjoint by content: rows that are equal go to the same side."""
    rows = [exchange("a", str(number % 20)) for number in range(60)]
    dataset = chat_dataset(tiny_tokenizer, write(tmp_path / "r.jsonl", *rows))
    training, validation = split_validation(dataset, 0.2, seed=0)
    assert len(training) + len(validation) == 60
    assert 6 <= len(validation) <= 18
    assert not set(texts(training, tiny_tokenizer)) & set(texts(validation, tiny_tokenizer))
    again = split_validation(dataset, 0.2, seed=0)[1]
    other = split_validation(dataset, 0.2, seed=1)[1]
    assert texts(validation, tiny_tokenizer) == texts(again, tiny_tokenizer) != texts(other, tiny_tokenizer)
    with pytest.raises(UserError, match="leaves nothing to train on"):
        split_validation(chat_dataset(tiny_tokenizer, write(tmp_path / "one.jsonl", SHORT)), 0.5, seed=0)


def test_the_cache_gives_the_same_rows_and_notices_every_change(tmp_path, tiny_tokenizer, monkeypatch):
    source = write(tmp_path / "r.jsonl", SHORT, exchange("a", "b"))
    first = chat_dataset(tiny_tokenizer, source, cache_dir=tmp_path / "cache")

    def refuse(*_):
        raise AssertionError("tokenized again")

    with monkeypatch.context() as patched:
        patched.setattr(Llama2ChatTransform, "encode_turns", refuse)
        cached = chat_dataset(tiny_tokenizer, source, cache_dir=tmp_path / "cache")
        assert [*cached] == [*first]
        assert str(cached.summaries[0]) == str(first.summaries[0])
        for change in ({"train_on": "all"}, {"max_seq_len": 12}, {"prompt_template": "alpaca"}, {"system_prompt": "x"}):
            with pytest.raises(AssertionError, match="tokenized again"):
                chat_dataset(Llama2ChatTransform(TINY_TOKENIZER, **change), source, cache_dir=tmp_path / "cache")
        write(tmp_path / "r.jsonl", SHORT, exchange("a", "c"))
        with pytest.raises(AssertionError, match="tokenized again"):
            chat_dataset(tiny_tokenizer, source, cache_dir=tmp_path / "cache")


def test_packed_is_torchtune_s_key_and_only_false_works(tmp_path, tiny_tokenizer):
    source = write(tmp_path / "r.jsonl", SHORT)
    assert len(chat_dataset(tiny_tokenizer, source, packed=False)) == 1
    with pytest.raises(UserError, match="dataset.packed: true is not done by chat_dataset"):
        chat_dataset(tiny_tokenizer, source, packed=True)


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, tiny_tokenizer, capsys):
    (tmp_path / "file").write_text("")
    dataset = chat_dataset(tiny_tokenizer, write(tmp_path / "r.jsonl", SHORT), cache_dir=tmp_path / "file")
    assert len(dataset) == 1
    assert "the tokens are not kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "num_rows"),
    [("alpaca.json", 100), ("openai_messages.jsonl", 100), ("sharegpt.json", 100), ("prompt_completion.jsonl", 100)],
)
def test_real_files_of_every_format(test_data, tiny_tokenizer, name, num_rows):
    dataset = chat_dataset(tiny_tokenizer, str(test_data(f"formats/{name}")))
    assert dataset.summaries[0].num_rows == dataset.summaries[0].num_kept == num_rows


def test_guanaco(test_data, tiny_tokenizer):
    """Two rows have an empty question, and one of several turns an empty answer: all are kept."""
    [summary] = chat_dataset(tiny_tokenizer, str(test_data("guanaco_llama2_1k/train.parquet"))).summaries
    assert (summary.num_rows, summary.num_kept) == (1000, 1000)
    assert summary.notes == {"with an empty question": 2, "empty answer{s} within a dialog shown and not trained": 1}
