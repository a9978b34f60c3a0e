"""Lists of sources: entries with settings of their own, checked before anything is tokenized."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_components.config.lora_settings import LoRASettings
from custom_components.config.reading import load_settings
from custom_components.datasets import WeightedSource, chat_dataset
from custom_components.datasets.summary import account
from custom_components.evaluation.scores import rows_by_source
from custom_components.runtime.errors import UserError
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from tests.support.paths import PROJECT


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def exchanges(word, count):
    return [{"prompt": "hi", "completion": f"{word} {number}"} for number in range(count)]


def answers(dataset, tokenizer):
    return [tokenizer.decode(row["tokens"]).split("[/INST]")[1].strip() for row in dataset]


@pytest.fixture
def first(tmp_path):
    return write(tmp_path / "first.jsonl", exchanges("first", 4))


@pytest.fixture
def second(tmp_path):
    return write(tmp_path / "second.jsonl", [{"frage": "hi", "antwort": "second"}])


WRONG_ENTRIES = [
    ({"sorce": "b"}, "[1].sorce: unknown key; did you mean 'source'?"),
    ({"wieght": 2}, r"[1].wieght: unknown key; did you mean 'weight'?"),
    ({"colum_map": {}}, "[1].colum_map: unknown key; did you mean 'column_map'?"),
    ({"frobnicate": 1}, "[1].frobnicate: unknown key"),
    *(({"weight": weight}, f"[1].weight: {weight!r} should be") for weight in (0, -1, "2", True, None, [1])),
    *(({"weight": float(weight)}, f"[1].weight: {weight} should be") for weight in ("nan", "inf", "-inf", "0.0")),
    ({"split": 1}, "[1].split: 1 should be a valid string"),
    ({"max_rows": 0}, "[1].max_rows: 0 should be greater than 0"),
    ({"column_map": {"prompt": 3}}, "[1].column_map.prompt: 3 should be a valid string"),
    ({"source": ""}, "[1].source: '' should be the name of a file"),
    ({"source": None}, "[1].source: None should be a valid string"),
]


@pytest.mark.parametrize(("entry", "problem"), WRONG_ENTRIES)
def test_L26_a_wrong_entry_is_named_before_anything_is_tokenized(first, tiny_tokenizer, monkeypatch, entry, problem):
    monkeypatch.setattr(Llama2ChatTransform, "encode_turns", lambda *_: pytest.fail("tokenized"))
    with pytest.raises(UserError) as error:
        chat_dataset(tiny_tokenizer, [first, {"source": first} | entry])
    [message] = error.value.messages
    assert message.startswith(f"dataset.source{problem}")


@pytest.mark.parametrize(("entry", "problem"), WRONG_ENTRIES)
def test_L26_a_wrong_entry_is_named_when_the_config_is_read(first, monkeypatch, entry, problem):
    monkeypatch.chdir(PROJECT)
    text = json.dumps([{"source": first}, {"source": first} | entry]).replace("Infinity", ".inf").replace("NaN", ".nan")
    for node in ("dataset", "dataset_val"):
        override = f"{node}={{_component_: custom_components.datasets.chat_dataset, source: {text}}}"
        with pytest.raises(UserError) as error:
            load_settings(LoRASettings, ["--config", "configs/tiny_qlora.yaml", override])
        [message] = error.value.messages
        key, _, rest = problem.partition(": ")
        assert message.startswith(f"{node}.source{key}: {rest.partition(';')[0]}")
        assert ("did you mean" in message) == ("did you mean" in problem)


def test_L26_all_wrong_entries_are_named_at_once(first, tiny_tokenizer):
    with pytest.raises(UserError) as error:
        chat_dataset(tiny_tokenizer, [{"source": first, "weight": -1}, {"wieght": 1}, 7, {"source": first, "x": 1}])
    assert [message.partition(":")[0].removeprefix("dataset.source") for message in error.value.messages] == [
        "[0].weight",
        "[1].source",
        "[1].wieght",
        "[2]",
        "[3].x",
    ]


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=8), st.none() | st.integers() | st.floats() | st.text(max_size=3), max_size=3))
def test_L26_any_entry_is_read_or_refused_with_its_place(tiny_tokenizer, entry):
    with pytest.raises(UserError) as error:
        chat_dataset(tiny_tokenizer, [{"source": "gone.jsonl"} | entry])
    assert all(message.startswith("dataset.source[0]") for message in error.value.messages)


def test_L32_every_entry_has_its_own_settings(tmp_path, first, second, tiny_tokenizer):
    folder = write(tmp_path / "folder/train.jsonl", exchanges("folder train", 2)).removesuffix("/train.jsonl")
    write(tmp_path / "folder/test.jsonl", exchanges("folder test", 2))
    text = write(tmp_path / "text.jsonl", [{"text": "### Human: a\n### Assistant: b"}])
    dataset = chat_dataset(
        tiny_tokenizer,
        [
            {"source": first, "max_rows": 2},
            {"source": second, "column_map": {"prompt": "frage", "completion": "antwort"}, "weight": 2},
            {"source": folder, "split": "test"},
            folder,
            {"source": first, "system_prompt": "Be kind.", "weight": 0.25},
            {"source": text, "format": "text"},
        ],
        max_rows=3,
    )
    texts = [tiny_tokenizer.decode(row["tokens"]) for row in dataset]
    assert [text.rpartition("[/INST]")[2].strip() for text in texts] == [
        *("first 0", "first 1", "second", "second", "folder test 0", "folder test 1"),
        *("folder train 0", "folder train 1", "first 0", "### Human: a\n### Assistant: b"),
    ]
    assert ["Be kind." in text for text in texts] == [False] * 8 + [True, False]
    assert set(rows_by_source(dataset)) == {first, second, f"{folder}, split test", folder, text}
    assert chat_dataset(tiny_tokenizer, [WeightedSource(source=first, max_rows=1)], max_rows=3).lengths[1:] == []


def test_L32_the_summary_says_the_rows_taken_of_each_source_and_their_sum(first, second, tiny_tokenizer):
    column_map = {"prompt": "frage", "completion": "antwort"}
    sources = [{"source": first, "weight": 0.5}, {"source": second, "weight": 3, "column_map": column_map}]
    lines = account(chat_dataset(tiny_tokenizer, sources).summaries).splitlines()
    assert "4 rows, 4 kept, 2 taken (weight 0.5)" in lines[0]
    assert "1 row, 1 kept, 3 taken (weight 3)" in lines[1]
    assert lines[2] == "2 sources: 5 rows"
    assert "taken" not in account(chat_dataset(tiny_tokenizer, first).summaries)


@pytest.mark.parametrize(("weight", "problem"), [(0.1, "makes 0 rows of 4; raise it"), (1e300, "of 4; lower it")])
def test_L32_no_source_vanishes_for_its_weight(first, tiny_tokenizer, weight, problem):
    with pytest.raises(UserError, match=problem) as error:
        chat_dataset(tiny_tokenizer, [first, {"source": first, "weight": weight}])
    assert first in str(error.value)


def test_L32_every_source_is_there_before_the_first_is_tokenized(first, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(Llama2ChatTransform, "encode_turns", lambda *_: pytest.fail("tokenized"))
    for entry, problem in (
        ("gone.jsonl", ": there is no file 'gone.jsonl'"),
        ({"source": first, "split": "test"}, ".split: 'test'.* has no splits"),
        ({"source": first, "subset": "en"}, ".subset: 'en' is for"),
    ):
        problem = rf"dataset.source\[1\]{problem}"
        with pytest.raises(UserError, match=problem):
            chat_dataset(tiny_tokenizer, [first, entry])


def test_the_cache_keeps_a_source_whatever_its_weight_and_says_todays_files(tmp_path, tiny_tokenizer, monkeypatch):
    source = write(tmp_path / "folder/train.jsonl", exchanges("a", 4)).removesuffix("/train.jsonl")
    chat_dataset(tiny_tokenizer, source, cache_dir=tmp_path / "cache")
    write(tmp_path / "folder/test.jsonl", exchanges("b", 1))
    monkeypatch.setattr(Llama2ChatTransform, "encode_turns", lambda *_: pytest.fail("tokenized again"))
    dataset = chat_dataset(tiny_tokenizer, [{"source": source, "weight": 0.5}], cache_dir=tmp_path / "cache")
    [summary] = dataset.summaries
    assert len(dataset) == summary.num_taken == 2
    assert summary.files == "reads train.jsonl, not test.jsonl (split test, 1 row)"
