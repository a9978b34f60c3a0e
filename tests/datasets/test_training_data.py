"""What a run says of its rows before it begins: what it validates on, and whether that is new."""

import json

import pytest

from custom_components.config.components import instantiate
from custom_components.config.lora_settings import LoRASettings
from custom_components.config.reading import load_settings
from custom_components.datasets import chat_dataset
from custom_components.datasets.tokenized_rows import split_validation
from custom_components.datasets.training_data import Data
from custom_components.recipe_parts.opening import open_rows
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from tests.support.paths import PROJECT, TINY_TOKENIZER


def write(path, *exchanges):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in exchanges))
    return str(path)


@pytest.fixture
def data_of(tmp_path, tiny_tokenizer):
    """The data of two lists of questions and answers."""

    def make(train, validation, tokenizer=tiny_tokenizer):
        datasets = [
            chat_dataset(tokenizer, write(tmp_path / f"{name}.jsonl", *rows))
            for name, rows in (("train", train), ("held_out", validation))
        ]
        return Data(*datasets, tokenizer)

    return make


def test_L32_validation_rows_that_are_trained_on_are_counted_and_said(data_of):
    rows = [("one", "1"), ("two", "2"), ("three", "3")]
    mixed = [*rows[:2], ("a", "1"), ("b", "1")]
    assert "3 of the 3 validation rows are also trained on" in data_of(rows, rows).account
    assert "2 of the 4 validation rows are also trained on" in data_of(rows, mixed).account
    assert "also trained on" not in data_of(rows, [("a", "1"), ("two", "22")]).account


def test_L32_prompts_with_another_answer_on_both_sides_are_counted_and_said(data_of):
    rows = [("one", "1"), ("two", "2"), ("two", "two"), ("three", "3")]
    said = data_of(rows, [("two", "deux"), ("two", "2"), ("three", "trois"), ("four", "4")]).account
    assert "2 of the 4 validation rows have a prompt that is trained on with another answer" in said
    assert "with another answer" not in data_of(rows, [("four", "2"), ("two", "2")]).account


@pytest.mark.parametrize("train_on", ["all", "last_assistant"])
def test_a_row_without_a_prompt_shares_none(data_of, train_on):
    tokenizer = Llama2ChatTransform(TINY_TOKENIZER, train_on=train_on)
    said = data_of([("one", "1")], [("one", "2"), ("two", "1")], tokenizer).account
    assert ("with another answer" in said) == (train_on == "last_assistant")


def test_L32_prompts_on_both_sides_of_val_fraction(tmp_path, tiny_tokenizer):
    rows = [(str(number % 5), str(number)) for number in range(40)]
    dataset = chat_dataset(tiny_tokenizer, write(tmp_path / "rows.jsonl", *rows))
    data = Data(*split_validation(dataset, 0.25, seed=0), tiny_tokenizer)
    assert "10 rows are kept for validation" in data.account
    assert "10 of the 10 validation rows have a prompt that is trained on with another answer" in data.account
    unique = chat_dataset(tiny_tokenizer, write(tmp_path / "unique.jsonl", *[(a, q) for q, a in rows]))
    assert "with another answer" not in Data(*split_validation(unique, 0.25, seed=0), tiny_tokenizer).account


def opened(monkeypatch, *overrides):
    monkeypatch.chdir(PROJECT)
    settings = load_settings(LoRASettings, ["--config", "configs/tiny_qlora.yaml", "cache_dir=null", *overrides])
    return open_rows(settings, instantiate(settings.tokenizer))


def test_L32_dataset_val_may_be_another_split_of_the_folder_and_is_accounted_for(tmp_path, monkeypatch):
    write(tmp_path / "rows/train.jsonl", ("one", "1"), ("two", "2"))
    write(tmp_path / "rows/valid.jsonl", ("three", "3"))
    folder = tmp_path / "rows"
    sources = [f"dataset.source={folder}", f"dataset_val.source={folder}"]
    data = opened(monkeypatch, *sources, "dataset_val.split=validation")
    assert (len(data.train), len(data.validation)) == (2, 1)
    assert "reads train.jsonl, not valid.jsonl (split valid, 1 row)" in data.account
    assert f"validation: {folder}, split validation" in data.account
    assert "reads valid.jsonl, not train.jsonl (split train, 2 rows)" in data.account
    data = opened(monkeypatch, *sources)
    assert "rows are kept for validation" not in data.account
    assert "2 of the 2 validation rows are also trained on" in data.account
    data = opened(monkeypatch, sources[0], "dataset_val=null", "run_val_every_n_steps=null")
    assert "validation" not in data.account


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dataset.system_prompt=A", "tokenizer.system_prompt=B"],
         "dataset.system_prompt is used for rows without one of their own, tokenizer.system_prompt 'B' is not"),
        (["dataset.system_prompt=A", "dataset_val.system_prompt=B"],
         "dataset_val.system_prompt 'B' is not the one that is trained with, 'A'"),
        (["dataset_val.system_prompt=B"], "dataset_val.system_prompt 'B' is not the one that is trained with, None"),
        (["dataset.system_prompt=A", "tokenizer.system_prompt=A", "dataset_val.system_prompt=A"], ""),
        (["tokenizer.system_prompt=A", "dataset_val.system_prompt=A"], ""),
    ],
)  # fmt: skip
def test_L32_a_system_prompt_that_is_not_used_is_said(monkeypatch, capsys, overrides, words):
    monkeypatch.chdir(PROJECT)
    load_settings(LoRASettings, ["--config", "configs/tiny_qlora.yaml", *overrides])
    assert capsys.readouterr().out == (f"note: {words}\n" if words else "")
