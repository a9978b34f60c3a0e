"""What preview shows is what is trained, row by row of the files, on any terminal, and as a page."""

import importlib
import io
import json
import os
import re
import sys
from html.parser import HTMLParser

import pytest

from custom_components.datasets.chat import chat_dataset, chat_readers
from custom_components.datasets.preview_page import page_file
from custom_components.datasets.preview_text import ASCII_BRACKETS, BRACKETS, COLOURS, row_text, spans_text
from custom_components.datasets.row_preview import length_histogram, row_spans, rows_of_dataset, rows_of_files
from custom_components.runtime.errors import UserError, run_recipe
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from tests.support.forked_tune import ForkedTune
from tests.support.paths import PROJECT, TINY_TOKENIZER
from tests.support.recipe_runs import run_here

ON_TINY = [
    *("--config", str(PROJECT / "configs/tiny_qlora.yaml"), f"tokenizer.path={TINY_TOKENIZER}", "cache_dir=null"),
    *("checkpoint_dir=not/there/yet", "model.checkpoint_dir=not/there/yet"),
]
OWN_ROWS = ["dataset_val=null", "run_val_every_n_steps=null"]
GOOD = {"prompt": "Who?", "completion": "Nobody."}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def shown(tokenizer, source, wanted=range(100), **settings):
    readers = chat_readers(tokenizer, source, **settings)
    return list(rows_of_files(readers, wanted, with_tokens=False))


def spans_of(tokenizer, messages):
    row = tokenizer({"messages": messages})
    labels = [-100 if masked else token for token, masked in zip(row["tokens"], row["mask"], strict=True)]
    return row_spans(row["tokens"], labels, tokenizer)


# ---- Text


def test_supervised_text_and_control_tokens_are_set_apart(tiny_tokenizer):
    spans = spans_of(
        tiny_tokenizer,
        [{"role": "user", "content": "Où?"}, {"role": "assistant", "content": "Là  </s> bas."}],
    )
    assert spans_text(spans, BRACKETS) == "⟨s⟩ [INST] Où? [/INST]⟦ Là  </s> bas. ⟨/s⟩⟧"
    assert spans_text(spans, ASCII_BRACKETS) == "{s} [INST] Où? [/INST][[ Là  </s> bas. {/s}]]"
    assert spans_text(spans, COLOURS).endswith("\033[32m Là  </s> bas. \033[7m</s>\033[27m\033[0m")


def test_a_row_cannot_command_the_terminal(tiny_tokenizer):
    answer = "\x1b[2J\x1b]0;owned\x07 \r \x9b31m \t tab\nline"
    spans = spans_of(tiny_tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}])
    text = spans_text(spans, BRACKETS)
    assert r"\x1b[2J\x1b]0;owned\x07 \x0d \x9b31m" in text and "\t tab\nline" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def test_histogram_counts_every_row():
    lines = length_histogram([1, 1, 5, 99]).splitlines()
    assert sum(int(line.split()[-1]) for line in lines if "#" in line) == 4
    assert all(len(line) <= 80 for line in length_histogram(list(range(8000))).splitlines())


# ---- Rows of the files


def test_L27_each_row_has_its_place_and_the_kept_ones_are_those_of_the_data_set(tmp_path, tiny_tokenizer):
    first = write(tmp_path / "a.jsonl", GOOD, "", GOOD | {"completion": "You."})
    second = write(tmp_path / "b.jsonl", {"prompt": "And?", "completion": ""}, GOOD | {"completion": "They."})
    rows = shown(tiny_tokenizer, [first, {"source": second, "weight": 3}])
    places = [row.name.partition(str(tmp_path))[2] for row in rows]
    assert places == ["/a.jsonl:1", "/a.jsonl:3", "/b.jsonl:1", "/b.jsonl:2"]
    assert [row.name.split(",")[0] for row in rows] == ["row 0", "row 1", "row 2", "row 3"]
    kept = [row for row in rows if row.spans]
    dataset = chat_dataset(tiny_tokenizer, [first, second])
    assert [row.spans for row in kept] == [
        row.spans for row in rows_of_dataset(dataset, tiny_tokenizer, range(9), with_tokens=False)
    ]
    assert [row.fate for row in kept] == [
        row.fate for row in rows_of_dataset(dataset, tiny_tokenizer, range(9), with_tokens=False)
    ]


@pytest.mark.parametrize(
    ("row", "settings", "reason"),
    [
        ({"prompt": "x"}, {}, "there is no column 'completion', but 'prompt'"),
        ('{"broken', {}, "not a JSON object"),
        ({"prompt": "a", "completion": ""}, {}, "dropped (empty answer)"),
        (GOOD | {"train": False}, {}, "dropped (marked as not trained)"),
        ({"prompt": "long " * 40, "completion": "b"}, {"on_overlong": "drop"}, "dropped (over max_seq_len)"),
        ({"prompt": "long " * 40, "completion": "b"}, {"on_overlong": "error"}, "tokens, max_seq_len is 32"),
        ({"prompt": "long " * 40, "completion": "b"}, {}, "dropped (nothing to train on)"),
        (GOOD | {"label": False}, {}, "'label' holds 'False', which judges the answer"),
    ],
)
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_L32_a_row_that_is_not_trained_on_says_why(tmp_path, row, settings, reason, on_bad_row):
    tokenizer = Llama2ChatTransform(TINY_TOKENIZER, max_seq_len=32)
    source = write(tmp_path / "rows.jsonl", GOOD, row, GOOD)
    first, second, third = shown(tokenizer, source, on_bad_row=on_bad_row, **settings)
    assert second.fate.startswith("not trained on: ") and reason in second.fate and not second.spans
    assert first.spans == third.spans and first.spans
    assert row_text(second, BRACKETS).startswith(f"---- row 1, {source}:2: not trained on: ")
    [alone] = shown(tokenizer, source, range(1, 2), on_bad_row=on_bad_row, **settings)
    assert alone == second


def test_a_row_is_shown_in_the_format_that_the_first_decides(tmp_path, tiny_tokenizer):
    prose, dialog = {"text": "Once."}, {"text": "### Human: a\n### Assistant: b"}
    [row] = shown(tiny_tokenizer, write(tmp_path / "rows.jsonl", prose, dialog), range(1, 2))
    assert "not trained on: is marked_text, where the set is text by its first row" in row.fate


def test_what_was_left_out_of_a_row_is_said_beside_it(tmp_path, tiny_tokenizer):
    messages = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    [row] = shown(tiny_tokenizer, write(tmp_path / "rows.jsonl", {"messages": messages}))
    assert row.fate.endswith(" supervised, 1 open last question left out")


def test_a_row_that_is_not_there_is_an_error(tmp_path, tiny_tokenizer):
    source = write(tmp_path / "rows.jsonl", GOOD, '{"broken', GOOD)
    with pytest.raises(UserError, match="row: 3 is not there, the files have the rows 0 to 2"):
        shown(tiny_tokenizer, source, range(3, 4))


# ---- The recipe


def test_preview_needs_only_tokenizer_and_data(tmp_path):
    """No checkpoint, no training: rows, counts, histogram and steps."""
    out = tmp_path / "out"
    code, printed, err = run_here("preview", *ON_TINY, f"output_dir={out}")
    assert code == 0, err
    for words in (
        "---- row 2, examples/tiny_llama/data/train.jsonl:3: ",
        "---- validation row 2, examples/tiny_llama/data/val.jsonl:3: ",
        "⟦ ",
        "1200 rows, 1200 kept",
        "validation: examples/tiny_llama/data/val.jsonl (messages): 90 rows",
        "rows by tokens",
        "150 optimizer steps, 5 of them warm-up",
    ):
        assert words in printed
    assert not out.exists()
    code, printed, _ = run_here("preview", *ON_TINY, "row=7", "batch_size=auto", "gradient_accumulation_steps=16")
    assert "---- row 7, " in printed and "trained" in printed and "validation row" not in printed
    assert "150 optimizer steps, 5 of them warm-up; as many rows a forward as fit" in printed
    code, _, err = run_here("preview", *ON_TINY, "row=5000")
    assert code == 2 and "the rows 0 to 1199" in err


def test_the_summary_has_what_training_says(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "train.jsonl", GOOD | {"id": 1}, {"x": 1}, GOOD | {"completion": "You."})
    write(folder / "valid.jsonl", GOOD)
    overrides = [f"dataset.source=[{{source: {folder}, weight: 2}}]", "on_bad_row=skip"]
    code, printed, err = run_here("preview", *ON_TINY, *OWN_ROWS, *overrides)
    assert code == 0, err
    for words in (
        *("reads train.jsonl, not valid.jsonl", "columns not used: id", "1 dropped (bad rows)", "train.jsonl:2: "),
        "2 kept, 4 taken (weight 2)",
    ):
        assert words in printed, printed


def test_rows_are_shown_also_where_a_bad_one_stops_training(tmp_path):
    source = write(tmp_path / "rows.jsonl", GOOD, {"prompt": "x"}, GOOD)
    code, printed, err = run_here("preview", *ON_TINY, *OWN_ROWS, f"dataset.source={source}")
    problem = (
        f"error: {source}:2: there is no column 'completion', but 'prompt'; on_bad_row=skip leaves such rows out\n"
    )
    assert code == 2 and err == problem
    assert [line.split(":")[1] for line in printed.splitlines() if line.startswith("---- ")] == ["1", "2", "3"]


def test_rows_kept_for_validation_are_marked(tmp_path):
    source = write(tmp_path / "rows.jsonl", *[GOOD | {"completion": str(number)} for number in range(8)])
    overrides = [f"dataset.source={source}", "dataset_val=null", "val_fraction=0.25", "num_rows=8"]
    _, printed, _ = run_here("preview", *ON_TINY, *overrides)
    assert printed.count("supervised, kept for validation\n") == 2 and "2 rows are kept for validation" in printed


def test_a_data_set_of_ones_own_is_shown_without_places(tmp_path, monkeypatch):
    (tmp_path / "own_rows.py").write_text(
        "from custom_components.datasets import chat_dataset\n"
        "def upper(tokenizer, source):\n    return chat_dataset(tokenizer, source, max_rows=1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    source = write(tmp_path / "rows.jsonl", GOOD, GOOD)
    node = f"dataset={{_component_: own_rows.upper, source: {source}}}"
    code, printed, err = run_here("preview", *ON_TINY, *OWN_ROWS, node, "--trust-components", "own_rows")
    assert code == 0, err
    assert printed.startswith("---- row 0: ") and "row 1" not in printed


@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "ascii", "utf-8"])
def test_every_encoding_of_the_output_is_printed_to(tmp_path, monkeypatch, encoding):
    source = write(tmp_path / "rows.jsonl", {"prompt": "Où? 日本 🎉", "completion": "Là. 日本 🎉"})
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["preview.py", *ON_TINY, *OWN_ROWS, f"dataset.source={source}", "row=0"])
    run_recipe(importlib.import_module("recipes.preview").recipe_main)
    printed = out.buffer.getvalue().decode(encoding)
    opening, closing = ("⟦", "⟨/s⟩⟧") if encoding == "utf-8" else ("[[", "{/s}]]")
    assert re.search(rf"\[/INST\]{re.escape(opening)} L\S+ \S+ \S+ {re.escape(closing)}", printed), printed


@pytest.mark.parametrize("num_rows", [1, 1000])
def test_a_reader_that_leaves_is_no_error(num_rows):
    """As `| head`: also where all of the output fits into the pipe's buffer."""
    reads, writes = os.pipe()
    os.close(reads)
    command = ForkedTune("run", "recipes/preview.py", *ON_TINY, f"num_rows={num_rows}", stdout=writes)
    os.close(writes)
    result = command.result()
    assert result.returncode == 141 and "Error" not in result.stderr and "Exception" not in result.stderr


# ---- The page


class Page(HTMLParser):
    """The text of a page by the class around it, its tags, and every attribute."""

    def __init__(self, html):
        super().__init__()
        self.by_class, self.tags, self.attributes, self.open_classes = {}, set(), [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag == "span":
            self.open_classes.append(dict(attributes).get("class"))

    def handle_endtag(self, tag):
        if tag == "span":
            self.open_classes.pop()

    def handle_data(self, data):
        for name in self.open_classes:
            self.by_class[name] = self.by_class.get(name, "") + data


def test_the_page_shows_the_same_with_colours_and_fetches_and_runs_nothing(tmp_path):
    attack = "</div><script>alert(1)</script><img src=http://x.test/a onerror=b> & </s> \x1b[2J"
    name = "<b>rows.jsonl"
    source = write(
        tmp_path / name, GOOD | {attack: 1}, {"prompt": attack, "completion": f"{attack}!"}, {"prompt": attack}
    )
    path = tmp_path / "rows.html"
    overrides = [f"dataset.source={source}", f"output_file={path}", "on_bad_row=skip"]
    code, printed, err = run_here("preview", *ON_TINY, *OWN_ROWS, *overrides)
    assert code == 0 and printed.endswith(f"page {path}\n"), err
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert not page.tags & {"script", "img", "b", "link", "iframe", "object", "a", "form", "base"}
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert not re.search(r"(?:src|href|url|@import)\s*[=(]", html.replace("src=http://x.test/a", ""))
    assert "default-src 'none'" in html and 'name="viewport" content="width=device-width' in html
    assert "\x1b" not in html
    shown_attack = attack.replace("\x1b", "\\x1b")
    trained = page.by_class["trained"]
    assert f" Nobody. </s> {shown_attack}! </s>" in trained and "[INST]" not in trained
    assert set(page.by_class["control"].replace("</s>", "").replace("<s>", "")) == set()
    plain_lines = [line for line in printed.splitlines() if line.startswith("---- ") and ": " in line]
    assert len(plain_lines) == 3 and html.count("<h2>row ") == 3 and "not trained on: " in html
    for words in ("columns not used: ", "Rows by tokens", "optimizer step"):
        assert words in html


def test_the_page_of_a_single_row_has_its_tokens(tmp_path):
    path = tmp_path / "rows.html"
    code, printed, err = run_here("preview", *ON_TINY, "row=3", f"output_file={path}")
    assert code == 0, err
    num_tokens = int(re.search(r"---- row 3, \S+: (\d+) tokens", printed)[1])
    assert path.read_text().count('<tr><td class="number">') == num_tokens


def test_no_page_is_left_of_a_preview_that_fails(tmp_path):
    path = tmp_path / "rows.html"
    code, _, _ = run_here("preview", *ON_TINY, f"dataset.source={tmp_path}/none.jsonl", f"output_file={path}")
    assert code == 2 and list(tmp_path.iterdir()) == []


def test_a_text_without_a_page_is_not_written(tmp_path):
    with page_file(None) as page:
        page.add_text("a", "b")
    assert list(tmp_path.iterdir()) == []
