"""The notebook in examples/: what is in git is whole and of no machine, and it runs from top to bottom."""

import importlib.util
import json
import re
import shutil

import pytest

from docs_pages.notebook import MACHINE_PATH, NOTEBOOK, executed
from tests.support.paths import PROJECT

CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
MADE_BY = "run `python -m docs_pages notebook`"


def printed(cell):
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def test_it_was_executed_in_order_without_an_error_and_has_its_pictures():
    assert [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)], MADE_BY
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} == {"stdout"}
    pictures = [output["data"]["image/png"] for output in outputs if output["output_type"] == "display_data"]
    assert len(pictures) == sum("pyplot.show()" in "".join(cell["source"]) for cell in CODE) > 3


def test_it_names_no_path_of_a_machine_and_is_small():
    text = NOTEBOOK.read_text()
    assert len(text) < 500_000
    assert not MACHINE_PATH.search(text), MADE_BY
    assert MACHINE_PATH.search("from /home/ann/x") and not MACHINE_PATH.search(
        "outputs/notebook/tmp/a https://a.org/usr/b"
    )


def test_what_it_names_is_there():
    source = "\n".join("".join(cell["source"]) for cell in CELLS)
    names = set(re.findall(r"(?:recipes|configs|docs|examples)/[\w/.]+\.(?:py|yaml|md|jsonl|safetensors)", source))
    assert len(names) > 8
    for name in names:
        assert (PROJECT / name).is_file(), name


def test_cells_that_need_a_gpu_say_so_and_did_nothing():
    of_7b = [cell for cell in CODE if "CHECKPOINT_7B" in "".join(cell["source"])]
    assert len(of_7b) == 3
    for cell in of_7b:
        assert cell["source"][0].startswith("# Needs ") and printed(cell) == "not run: no GPU\n"


@pytest.mark.skipif(importlib.util.find_spec("nbformat") is None, reason="nbformat is not installed: `make test` does")
def test_it_is_valid():
    import nbformat

    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_and_leaves_nothing_elsewhere(tmp_path, monkeypatch):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name in ("examples", "recipes", "configs", "custom_components"):
        shutil.copytree(PROJECT / name, tmp_path / f"project/{name}", ignore=shutil.ignore_patterns("__pycache__"))
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    content = executed(NOTEBOOK, tmp_path / "project/examples")
    outputs = [output for cell in content.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output["text"] for output in outputs if output["output_type"] == "stream")
    [num_asked, num_before, num_after] = map(
        int, re.search(r"right, of (\d+): (\d+) before, (\d+) after", text).groups()
    )
    assert num_before == 0 and num_after > 0.9 * num_asked
    assert "error" not in text and len([output for output in outputs if "data" in output]) == 5
    assert list(home.iterdir()) == [] and (tmp_path / "project/outputs/notebook_merged").is_dir()
