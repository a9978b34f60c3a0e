"""Rows of files: every kind that is read, and a UserError with the place for everything that cannot be."""

import gzip
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_components.datasets.file_readers import BadRow
from custom_components.datasets.sources import find_source, read_rows
from custom_components.runtime.errors import UserError

ROWS = [{"text": 'one, "two"\nthree'}, {"text": "vier und fünf €"}, {"text": "6"}]
TABLE = pyarrow.Table.from_pylist(ROWS)
JSON_LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
CSV = '\ufefftext,id\r\n"one, ""two""\nthree",1\r\n\r\nvier und fünf €,2\r\n6,3\r\n'.encode()


def written(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def arrow_stream() -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return sink.getvalue().to_pybytes()


def feather() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.feather.write_feather(TABLE, sink)
    return sink.getvalue().to_pybytes()


def parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(TABLE, sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSON_LINES),
        ("a.JSONL", b"\xef\xbb\xbf" + JSON_LINES.replace(b"\n", b"\r\n\r\n")),
        ("a.jsonl.gz", gzip.compress(JSON_LINES, mtime=0)),
        ("a.json", json.dumps(ROWS, indent=2).encode()),
        ("a.json", JSON_LINES),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("a.csv", CSV),
        ("a.csv.gz", gzip.compress(CSV, mtime=0)),
        ("a.tsv", CSV.replace(b",id", b"\tid").replace(b",1", b"\t1").replace(b",2", b"\t2").replace(b",3", b"\t3")),
        ("a.parquet", parquet()),
        ("a.arrow", arrow_stream()),
        ("a.feather", feather()),
    ],
)
def test_a_file_of_every_kind(tmp_path, name, content):
    rows = list(read_rows(written(tmp_path / name, content)))
    assert [row.values["text"] for row in rows] == [row["text"] for row in ROWS]
    assert all(row.location.startswith(str(tmp_path / name)) for row in rows)


def test_locations_are_the_first_lines_of_the_records(tmp_path):
    locations = [row.location for row in read_rows(written(tmp_path / "a.csv", CSV))]
    assert [location.rpartition(":")[2] for location in locations] == ["2", "5", "6"]
    locations = [row.location for row in read_rows(written(tmp_path / "a.jsonl", b'\n{"a": 1}\n\n{"a": 2}'))]
    assert [location.rpartition(":")[2] for location in locations] == ["2", "4"]
    locations = [row.location for row in read_rows(written(tmp_path / "a.json", b'[{"a": 1}, {"a": 2}]'))]
    assert [location.rpartition(" ")[2] for location in locations] == ["1", "2"]


def test_a_directory_and_a_glob_are_read_in_the_order_of_names(tmp_path):
    (tmp_path / "deeper").mkdir()
    for name in ("b.jsonl", "a.jsonl", "c.json", "deeper/d.jsonl"):
        written(tmp_path / name, json.dumps({"text": name}).encode() + b"\n" * 2 if "l" in name else b"[]")
    for name in ("README.md", ".hidden.jsonl", "dataset_info.json", "state.json"):
        written(tmp_path / name, b"{}")

    def texts(source: Path) -> list[str]:
        return [row.values["text"] for row in read_rows(str(source))]

    assert texts(tmp_path) == ["a.jsonl", "b.jsonl"]
    assert texts(tmp_path / "[b-z].jsonl") == ["b.jsonl"]
    assert texts(tmp_path / "**/*.jsonl") == ["a.jsonl", "b.jsonl", "deeper/d.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b"", "has no rows$"),
        ("a.json", b" \n", "has no rows$"),
        ("a.json", b"[]", "has no rows$"),
        ("a.csv", b"text,id\n", "has no rows$"),
        ("a.parquet", b"", "a.parquet: not a whole parquet file"),
        ("a.parquet", parquet()[:-9], "a.parquet: not a whole parquet file"),
        ("a.arrow", arrow_stream()[:-60], "a.arrow: not a whole arrow file"),
        ("a.feather", JSON_LINES, "a.feather: not a whole feather file"),
        (
            "a.jsonl",
            b'{"a": 1}\n' + "vier und fünf".encode("latin-1"),
            r"a.jsonl:2: byte 0xfc is not UTF-8 .*vier und f",
        ),
        ("a.csv", b"a,b\n1,2\n3,\xff\n", "a.csv:3: byte 0xff is not UTF-8"),
        ("a.json", b'[\n{"a":\n"\xe9"}]', "a.json:3: byte 0xe9 is not UTF-8"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "a.jsonl:1: byte 0x00 is not UTF-8"),
        ("a.csv", parquet(), "a.csv:1: byte 0x00 is not UTF-8"),
        ("a.jsonl.gz", JSON_LINES, "a.jsonl.gz:1: cannot be read from here on"),
        ("a.jsonl.gz", gzip.compress(JSON_LINES, mtime=0)[:-12], "a.jsonl.gz:.: cannot be read from here on"),
        (
            "a.jsonl",
            b'{"a": 1}\n{"a": 2\n',
            r"a.jsonl:2: not a JSON object \(Expecting ',' delimiter .* in '{\"a\": 2'",
        ),
        ("a.jsonl", b"[1, 2]", r"a.jsonl:1: holds \[1, 2\] where an object with columns is due"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not a JSON object .nested too deeply"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "a.jsonl:1: not a JSON object .Exceeds the limit"),
        ("a.json", b'[{"a": 1},\n{"a" 2}]', "a.json:2: not valid JSON .Expecting ':' delimiter at column 6, in "),
        ("a.json", b'{"rows": []}', "a.json: holds dict; a JSON data file is a list of objects"),
        ("a.json", b'[{"a": 1}, null]', "a.json row 2: holds None where"),
        ("a.csv", b"a,b\n1,2\nsome text\n", "a.csv:3: has 1 cells, the header has 2: 'some text'"),
        ("a.csv", b"a,b\n1,2,3\n", "a.csv:2: has 3 cells, the header has 2"),
        ("a.csv", b"a,a\n1,2\n", "a.csv:1: the header has 'a' more than once"),
        ("a.csv", b'a,b\n1,2\n3,"open\n5,6\n', "a.csv:3: not valid CSV .*from this record on"),
        ("a.txt", b"hello", "a.txt' is not a .jsonl, .json, .csv"),
    ],
)
def test_a_broken_file_is_one_line_that_names_the_place(tmp_path, name, content, problem):
    with pytest.raises(UserError, match=problem) as raised:
        list(read_rows(written(tmp_path / name, content)))
    assert "\n" not in str(raised.value)
    assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("nowhere.jsonl", "there is no file '.*nowhere.jsonl'"),
        ("no*thing.jsonl", "no file matches '.*no.thing.jsonl'"),
        ("directory", "the folder '.*directory' has no .jsonl, .* but inner/, notes.txt; .* glob"),
        ("directory/*", r"directory/\*' has no .jsonl, .* but notes.txt;"),
    ],
)
def test_a_source_that_names_no_data_file(tmp_path, source, problem):
    (tmp_path / "directory/inner").mkdir(parents=True)
    written(tmp_path / "directory/notes.txt", b"hello")
    with pytest.raises(UserError, match=problem):
        next(read_rows(str(tmp_path / source)))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_name_that_cannot_be_reached(streaming):
    with pytest.raises(
        UserError, match="'owner/name' is no file here .* split 'train', subset 'en', revision 'v1': "
    ) as raised:
        next(find_source("owner/name", subset="en", revision="v1", streaming=streaming).rows())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_the_hub_is_asked_for(monkeypatch, streaming):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        yield ROWS[0]
        raise ConnectionError("lost\nfor good")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    rows = find_source("owner/name", "test", "en", "v1", streaming).rows()
    row = next(rows)
    assert (row.values, row.location) == (ROWS[0], "owner/name row 1")
    assert asked == [(("owner/name", "en"), {"split": "test", "revision": "v1", "streaming": streaming})]
    with pytest.raises(UserError, match="after row 1: lost for good"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content", "num_bad"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n7\n{"a": 2}\n', 2),
        ("a.json", b'[{"a": 1}, null, {"a": 2}]', 1),
        ("a.csv", b"a,b\n1,x\n9\n2,x\n3,x,x\n", 2),
    ],
)
def test_reading_goes_on_behind_a_bad_row(tmp_path, name, content, num_bad):
    source = written(tmp_path / name, content)
    bad_rows: list[BadRow] = []
    assert [int(row.values["a"]) for row in read_rows(source, on_bad_row=bad_rows.append)] == [1, 2]
    assert len(bad_rows) == num_bad
    with pytest.raises(BadRow, match=str(bad_rows[0]).replace("[", r"\[").replace("(", r"\(").replace(")", r"\)")):
        list(read_rows(source))


def test_nothing_but_bad_rows_is_an_error_with_their_number(tmp_path):
    with pytest.raises(UserError, match="has no rows: all 2 records are broken"):
        list(read_rows(written(tmp_path / "a.jsonl", b"1\n2\n"), on_bad_row=lambda bad_row: None))


def test_files_are_read_only_as_far_as_rows_are_taken(tmp_path):
    rows = read_rows(written(tmp_path / "a.jsonl", b'{"a": 1}\nbroken\n'))
    assert next(rows).values == {"a": 1}


def assert_only_user_errors(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        for row in read_rows(str(path)):
            assert isinstance(row.values, dict)
    except UserError as error:
        assert "\n" not in str(error)


SUFFIXES = [".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".parquet", ".arrow", ".feather"]
text_bytes = st.lists(st.sampled_from(list('[]{}",:\r\n\t 1aé"')), max_size=60).map(
    lambda marks: "".join(marks).encode()
)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_but_a_user_error_comes_of_any_bytes(tmp_path_factory, suffix):
    path = tmp_path_factory.mktemp("any") / f"a{suffix}"

    @settings(deadline=None)
    @given(st.binary() | text_bytes | text_bytes.map(gzip.compress))
    def check(content: bytes) -> None:
        assert_only_user_errors(path, content)

    check()


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".parquet", parquet()),
        (".arrow", arrow_stream()),
        (".feather", feather()),
        (".jsonl.gz", gzip.compress(JSON_LINES, mtime=0)),
    ],
)
def test_nothing_but_a_user_error_comes_of_a_file_with_wrong_bytes(tmp_path, suffix, content):
    generator = random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        assert_only_user_errors(tmp_path / f"a{suffix}", bytes(damaged))


def test_real_files(test_data):
    for name in ("alpaca.json", "openai_messages.jsonl", "sharegpt.json", "prompt_completion.jsonl"):
        assert len(list(read_rows(str(test_data(f"formats/{name}"))))) == 100
    assert len(list(read_rows(str(test_data("guanaco_llama2_1k"))))) == 1000
