"""`make demo`: the embedded model cannot answer before, and can after."""

import json
import subprocess
import sys

import pytest

from custom_components.runtime.errors import UserError
from examples.tiny_llama import demo
from tests.support.paths import PROJECT, snapshot

BEGINNING = ["epochs=1", "max_steps_per_epoch=45", "run_val_every_n_steps=null", "dataset_val=null"]


@pytest.mark.parametrize(
    ("overrides", "least_share"),
    [
        pytest.param(BEGINNING, 0.4, id="its beginning"),
        pytest.param([], 0.8, id="as it is", marks=pytest.mark.slow),
    ],
)
def test_the_demo_teaches_the_tiny_llama_to_answer(tmp_path, overrides, least_share):
    arguments = [f"output_dir={tmp_path / 'out'}", "cache_dir=null", *overrides]
    command = [sys.executable, "-m", "examples.tiny_llama.demo", *arguments]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stderr.splitlines() if not line.startswith("step ")] == []  # no library's words
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert set(report) == {"exact_match_base", "exact_match_tuned", "num_questions", "train_seconds"}
    assert report["num_questions"] >= 300
    assert report["exact_match_base"] <= 0.1
    assert report["exact_match_tuned"] >= least_share
    assert report["train_seconds"] > 0
    for words in ("    base   ", "    tuned  ", "loss.png", "report.json"):
        assert words in result.stdout


@pytest.mark.parametrize("kind", ["text", "json", "directory", "link"])
def test_L33_a_report_that_is_not_the_demos_stays_and_nothing_is_trained(tmp_path, capsys, monkeypatch, kind):
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(sys, "argv", ["demo", f"output_dir={tmp_path}"])
    monkeypatch.setattr(demo, "returncode_of", lambda command: pytest.fail(str(command)))
    report = tmp_path / "report.json"
    if kind == "directory":
        report.mkdir()
    elif kind == "link":
        report.symlink_to(tmp_path / "elsewhere")
    else:
        report.write_text({"text": "mine", "json": '{"mine": 1}'}[kind])
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="report.json' is not the report of a demo"):
        demo.main()
    assert snapshot(tmp_path) == before
    assert capsys.readouterr().out == ""


def test_a_demo_replaces_the_report_of_an_earlier_one(tmp_path):
    (tmp_path / "report.json").write_text('{"exact_match_tuned": 0.5}')
    demo.check_no_other_file(tmp_path / "report.json")


def test_no_question_is_about_what_training_asked():
    """The held-out villages are in no training or validation row."""

    def rows(name):
        lines = (PROJECT / f"examples/tiny_llama/data/{name}.jsonl").read_text().splitlines()
        return [json.loads(line)["messages"] for line in lines]

    def capitalised(name):
        words = (word.strip("?.,'") for dialog in rows(name) for word in dialog[0]["content"].split()[1:])
        return {word for word in words if word[:1].isupper()}

    assert len(capitalised("held_out")) >= 100
    assert not capitalised("held_out") & (capitalised("train") | capitalised("val"))
    answers = [dialog[-1]["content"] for dialog in rows("held_out")]
    assert max(map(answers.count, set(answers))) / len(answers) < 0.1
