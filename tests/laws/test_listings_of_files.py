"""L32: of a folder or glob no file is passed over: it is read as a split says, or named as left out, with its rows."""

import json

import pytest

from custom_components.datasets.source_files import is_on_hub
from custom_components.datasets.sources import find_source
from custom_components.runtime.errors import UserError


@pytest.fixture
def make_folder(tmp_path):
    """A folder of files with one row each, whose text is the file's name; folders end in `/`."""

    def make(*names, folder="data"):
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                path.mkdir()
            else:
                path.write_text(json.dumps({"text": name}) + "\n")
        return tmp_path / folder

    return make


def texts(source, split="train"):
    return [row.values["text"] for row in find_source(str(source), split).rows()]


def account(source, split="train"):
    return find_source(str(source), split).files.account


@pytest.mark.parametrize(
    ("names", "split", "read"),
    [
        (["train.jsonl", "valid.jsonl", "test.jsonl"], "train", ["train.jsonl"]),
        (["train.jsonl", "valid.jsonl", "test.jsonl"], "validation", ["valid.jsonl"]),
        (["train.jsonl", "valid.jsonl", "test.jsonl"], "test", ["test.jsonl"]),
        (["train.jsonl", "valid.jsonl", "test.jsonl"], "test+train", ["test.jsonl", "train.jsonl"]),
        *((["training.jsonl", f"{name}.jsonl"], "validation", [f"{name}.jsonl"]) for name in ("dev", "val", "valid")),
        *((["training.jsonl", f"{name}.jsonl"], "train", ["training.jsonl"]) for name in ("eval", "testing", "dev")),
        (["val.jsonl", "dev.jsonl", "train.jsonl"], "dev", ["dev.jsonl"]),
        (["val.jsonl", "dev.jsonl", "train.jsonl"], "validation", ["dev.jsonl", "val.jsonl"]),
        (["oasst_train.jsonl", "oasst_test.jsonl"], "train", ["oasst_train.jsonl"]),
        (["Train-1.jsonl", "Train-2.jsonl", "TEST.jsonl"], "train", ["Train-1.jsonl", "Train-2.jsonl"]),
        (["latest.jsonl", "trainer.jsonl"], "train", ["latest.jsonl", "trainer.jsonl"]),
        (["part1.jsonl", "part2.jsonl"], "train", ["part1.jsonl", "part2.jsonl"]),
        (["alpaca.jsonl", "test.jsonl"], "train", ["alpaca.jsonl"]),
        (["alpaca.jsonl", "train.jsonl", "test.jsonl"], "train", ["train.jsonl"]),
        (["train_and_test.jsonl", "test.jsonl"], "train", ["train_and_test.jsonl"]),
        (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], "train", ["train/a.jsonl", "train/b.jsonl"]),
        (["train/test_cases.jsonl", "validation/a.jsonl"], "train", ["train/test_cases.jsonl"]),
        (["data/train.jsonl", "data/test.jsonl"], "test", ["data/test.jsonl"]),
        (["data/train-00000-of-00002-ab.jsonl", "data/train-00001-of-00002-cd.jsonl", "data/test-00000-of-00001.jsonl"],
         "train", ["data/train-00000-of-00002-ab.jsonl", "data/train-00001-of-00002-cd.jsonl"]),
        (["data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"], "train_sft",
         ["data/train_sft-00000-of-00001.jsonl"]),
        (["data/en-00000-of-00001.jsonl", "data/de-00000-of-00001.jsonl"], "de", ["data/de-00000-of-00001.jsonl"]),
    ],
)  # fmt: skip
def test_L32_a_folder_is_read_as_its_splits_and_says_which_files(make_folder, names, split, read):
    folder = make_folder(*names)
    assert texts(folder, split) == read
    said = account(folder, split)
    read_words, _, left_words = said.partition(", not ")
    assert read_words == f"reads {', '.join(read)}"
    assert all(name in left_words for name in names if name not in read)


@pytest.mark.parametrize(
    ("names", "split", "problem"),
    [
        (
            ["test.jsonl"],
            "train",
            "dataset.split: 'train' is not a split of the folder .*; it has test: set dataset.split",
        ),
        (["valid.jsonl", "test.jsonl"], "train", "it has test, valid: set dataset.split to one"),
        (["train.jsonl", "test.jsonl"], "validation", "it has test, train: set"),
        (["train.jsonl", "test.jsonl"], "tset", "dataset.split: 'tset' is not a split"),
        (["train.jsonl", "test.jsonl"], "", "dataset.split: '' is not a split"),
        (["train.jsonl", "test.jsonl"], "train+dev", "dataset.split: 'dev' is not a split"),
        (["part1.jsonl", "part2.jsonl"], "test", "'test': no file of the folder .* names a split; set it to train"),
        (["data/train_sft-00000-of-00001.jsonl"], "train", "it has train_sft: set dataset.split to one"),
        (["en/train.jsonl", "de/train.jsonl"], "train", "the folder .* has no .* but de/, en/; .* name one of them"),
        *(
            (["train.jsonl"], split, "slices .* dataset.max_rows")
            for split in ("train[:2]", "train[:10%]", "train[5:]")
        ),
        (["README.md", "a.jsonl.zst"], "train", "has no .* but a.jsonl.zst;"),
    ],
)
def test_L32_a_split_that_is_not_there_is_an_error_with_those_that_are(make_folder, names, split, problem):
    with pytest.raises(UserError, match=problem) as error:
        find_source(str(make_folder(*names)), split)
    assert "\n" not in str(error.value)


def test_L32_what_a_folder_holds_besides_its_data_is_named_and_stops_nothing(make_folder):
    metadata = [
        "dataset_infos.json",
        "dataset_info.json",
        "config.json",
        "README.md",
        "README",
        "LICENSE",
        "NOTICE",
    ]
    folder = make_folder("a.jsonl", "b.jsonl.zst", "c.txt", "deeper/d.jsonl", ".gitattributes", ".x.jsonl", *metadata)
    (folder / "e.jsonl").symlink_to(folder / "nowhere")
    assert texts(folder) == ["a.jsonl"]
    assert account(folder) == (
        "reads a.jsonl, not b.jsonl.zst, c.txt (not a kind of file that is read), not deeper/ (a folder of its own), "
        "not e.jsonl (a link to nothing)"
    )


def test_L32_many_files_are_named_by_the_first_and_last(make_folder):
    folder = make_folder(*(f"train-{number}.jsonl" for number in range(10, 17)), "test.jsonl")
    assert account(folder) == "reads 7 files, train-10.jsonl to train-16.jsonl, not test.jsonl (split test, 1 row)"


def test_L32_files_that_are_left_out_are_named_with_their_rows_where_they_are_quickly_counted(make_folder):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = make_folder("train.jsonl", "valid.jsonl", "notes.jsonl", "test-1.csv", "test-2.jsonl")
    (folder / "valid.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n{"text": "c"}')
    parquet.write_table(pyarrow.table({"text": ["a"] * 5}), folder / "dev.parquet")
    (folder / "eval.parquet").write_text("damaged")
    said = account(folder)
    for words in (
        *("not valid.jsonl (split valid, 3 rows)", "not notes.jsonl (names no split, 1 row)"),
        *("not dev.parquet (split dev, 5 rows)", "not test-1.csv, test-2.jsonl (split test, rows not counted)"),
        "not eval.parquet (split eval, rows not counted)",
    ):
        assert words in said, said


def test_L32_what_datasets_saved_is_read_without_what_it_cached(tmp_path):
    """`save_to_disk` of one data set and of several; a later `map` leaves its cache among the files."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": str(number)} for number in range(4)])
    splits = {"train": rows, "test": rows.select([3]), "train_sft": rows.select([1, 2])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    rows.save_to_disk(tmp_path / "rows", num_shards=2)
    datasets.load_from_disk(tmp_path / "rows").map(lambda row: {"text": row["text"] + "x"})
    [cached] = (tmp_path / "rows").glob("cache-*")
    assert texts(tmp_path / "rows") == ["0", "1", "2", "3"]
    assert f"not {cached.name} (not of the saved data set)" in account(tmp_path / "rows")
    for split, expected in {
        "train": ["0", "1", "2", "3"],
        "validation": None,
        "test": ["3"],
        "train_sft": ["1", "2"],
    }.items():
        if expected is not None:
            assert texts(tmp_path / "splits", split) == expected
    with pytest.raises(UserError, match="'validation' is not a split of .*; it has test, train, train_sft"):
        texts(tmp_path / "splits", "validation")


def test_L32_a_glob_is_read_as_splits_only_where_it_matches_several(make_folder, tmp_path):
    folder = make_folder("train.jsonl", "test_1.jsonl", "test_2.jsonl", "README.md")
    assert texts(f"{folder}/*.jsonl") == ["train.jsonl"]
    assert account(f"{folder}/*") == "reads train.jsonl, not test_1.jsonl, test_2.jsonl (split test, 2 rows)"
    assert texts(f"{folder}/*", "test") == ["test_1.jsonl", "test_2.jsonl"]
    assert (
        texts(f"{folder}/test_*.jsonl") == texts(f"{folder}/test_*.jsonl", "test") == ["test_1.jsonl", "test_2.jsonl"]
    )
    with pytest.raises(UserError, match="'validation' is not a split"):
        texts(f"{folder}/test_*.jsonl", "validation")
    nested = make_folder("en/train/a.jsonl", "en/test/a.jsonl", "de/train/a.jsonl", folder="training of 2024")
    assert texts(f"{nested}/**/*.jsonl") == ["de/train/a.jsonl", "en/train/a.jsonl"]
    plain = make_folder("a.jsonl", "b.jsonl", folder="test")  # the folder's own name is not in the glob's reach
    assert texts(f"{plain}/*.jsonl") == ["a.jsonl", "b.jsonl"]


def test_L32_a_single_file_is_what_it_is_and_has_no_other_split(make_folder):
    folder = make_folder("rows.jsonl", "test.jsonl")
    assert texts(folder / "test.jsonl") == texts(folder / "test.jsonl", "test") == ["test.jsonl"]
    assert account(folder / "rows.jsonl") == ""
    for name, split in (("rows.jsonl", "test"), ("test.jsonl", "validation"), ("rows.jsonl", "train+test")):
        with pytest.raises(UserError, match="dataset.split: .* has no splits; name the file of that split"):
            find_source(str(folder / name), split)
    with pytest.raises(UserError, match=r"dataset.split: 'train\[:2\]'.* dataset.max_rows"):
        find_source(str(folder / "rows.jsonl"), "train[:2]")


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ({"subset": "en"}, "dataset.subset: 'en' is for data sets on the hub, .*; name the files of that subset"),
        ({"revision": "v1"}, "dataset.revision: 'v1' is for data sets on the hub"),
        ({"streaming": True}, "dataset.streaming: True is for data sets on the hub, .*; .* set it to false"),
    ],
)
def test_L32_a_setting_of_hub_data_sets_is_an_error_beside_files(make_folder, setting, problem):
    folder = make_folder("train.jsonl")
    for source in (folder, folder / "train.jsonl", f"{folder}/*.jsonl"):
        with pytest.raises(UserError, match=problem):
            find_source(str(source), **setting)
        assert find_source("owner/name", **setting).files is None
    with pytest.raises(UserError) as error:
        find_source(str(folder), subset="en", revision="v1", streaming=True)
    assert len(error.value.messages) == 3


@pytest.mark.parametrize("source", ["", " ", "\t"])
def test_L32_an_empty_source_is_not_the_working_directory(source):
    with pytest.raises(UserError, match="dataset.source: is empty"):
        find_source(source)


def test_hub_names_and_files(make_folder, monkeypatch):
    monkeypatch.chdir(make_folder("here/there/a.jsonl").parent)
    assert is_on_hub("owner/name")
    for source in ("data/here", "data/gone.jsonl", "data/*.jsonl", "gone", "a/b/c", "/x", "x/", "./data"):
        assert not is_on_hub(source)


def test_a_folder_named_as_a_glob_is_that_folder(make_folder):
    assert texts(make_folder("a.jsonl", folder="data[1]")) == ["a.jsonl"]
    assert texts(make_folder("b[0].jsonl", folder="other") / "b[0].jsonl") == ["b[0].jsonl"]


def test_what_is_no_file_is_not_read(tmp_path):
    import os

    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="is not a file"):
        find_source(str(tmp_path / "rows.jsonl"))
    with pytest.raises(UserError, match="has no .* but rows.jsonl;"):
        find_source(str(tmp_path))


@pytest.mark.parametrize("source", ["~nobody-of-that-name/rows.jsonl", "a" * 5000, "x\0.jsonl", "/dev/null"])
def test_a_name_that_is_no_path_is_one_line(source):
    with pytest.raises(UserError, match="^dataset.source: ") as error:
        find_source(source)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_listed_is_one_line(make_folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    folder = make_folder("a.jsonl")
    monkeypatch.setattr(type(folder), "iterdir", refuse)
    with pytest.raises(UserError, match="dataset.source: .* cannot be read .Permission denied."):
        find_source(str(folder))
