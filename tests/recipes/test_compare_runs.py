"""recipes/compare_runs.py on runs of every training recipe, and on what evaluations say of them."""

import json
import os
import re

import pytest

from custom_components.evaluation.report import results_file
from tests.support.checkpoints import write_checkpoint
from tests.support.paths import PROJECT, snapshot
from tests.support.recipe_runs import arguments, full_arguments, preference_arguments, run_here
from tests.support.rows import random_dialogs, write_dialogs, write_pairs

CONFIG = str(PROJECT / "configs/compare_runs.yaml")
MORE = ["max_steps=1", "val_fraction=0.2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of the three training recipes; what each said of its parameters is in said.json."""
    folder = tmp_path_factory.mktemp("compared")
    base = write_checkpoint(folder / "base")
    rows = write_dialogs(folder / "rows.jsonl", random_dialogs(12))
    pairs = write_pairs(folder / "pairs.jsonl", 8)
    runs = {
        "lora": ("lora_single_device", arguments(base, rows, folder / "runs/lora", *MORE)),
        "dpo": ("lora_dpo_single_device", preference_arguments(base, pairs, folder / "runs/dpo", *MORE)),
        "full": (
            "full_single_device",
            full_arguments(base, rows, folder / "runs/full", *MORE, "train_only=[layers.1]"),
        ),
    }
    said = {}
    for name, (recipe, command) in runs.items():
        code, out, err = run_here(recipe, *command)
        assert code == 0, err
        said[name] = re.search(r"([\d,]+) trained parameters", out)[1]
        samples = [
            {"step": 1, "prompt": "Who <b>?", "answer": f"{name} <i>"},
            {"step": 1, "prompt": "So?", "answer": ""},
        ]
        (folder / f"runs/{name}/samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (folder / "said.json").write_text(json.dumps(said))
    return folder


def compare(*overrides):
    return run_here("compare_runs", "--config", CONFIG, *overrides)


def write_results(path, adapter_dir, answers, checkpoint_dir="base"):
    """Results as evaluate.py writes them."""
    model = "tuned" if adapter_dir else "base"
    rows = [{"prompt": "Who?", "reference": "Nobody.", model: answer} for answer in answers]
    share = sum(answer == "Nobody." for answer in answers) / len(answers)
    with results_file(path) as results:
        results |= {"checkpoint_dir": str(checkpoint_dir), "adapter_dir": adapter_dir and str(adapter_dir)}
        results |= {"results": {"answers": {model: {"exact_match": share}}}, "answers": rows}


def row_of(printed, label):
    return next(line for line in printed.splitlines() if line.startswith(label))


def test_runs_of_every_recipe_are_compared(folder, tmp_path):
    before = snapshot(folder)
    code, out, err = compare(f"run_dirs=[{folder}/runs/*]", f"output_file={tmp_path}/page.html")
    assert code == 0 and err == "" and max(map(len, out.splitlines()[:-1])) <= 80
    said = json.loads((folder / "said.json").read_text())
    assert row_of(out, "trained parameters").split()[2:] == [said[name] for name in ("dpo", "full", "lora")]
    assert row_of(out, "optimizer steps").split()[2:] == ["1"] * 3
    text = (tmp_path / "page.html").read_text()
    assert text.count("<img ") == 4 and text.count("after step 1") == 6
    assert "Who &lt;b&gt;?" in text and "full &lt;i&gt;" in text and text.count("(nothing)") == 3
    assert snapshot(folder) == before and [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_one_run_and_a_copy_of_it(folder, tmp_path):
    code, out, _ = compare(f"run_dirs=[{folder}/runs/lora]")
    assert code == 0 and "differ" not in out and "lora_rank" not in out and row_of(out, "best val loss")
    (tmp_path / "copy").symlink_to(folder / "runs")
    code, _, err = compare(f"run_dirs=[{folder}/runs/lora,{tmp_path}/copy/lora]")
    assert code == 2 and len(err.splitlines()) == 1


def test_evaluations_are_found_beside_their_runs_or_by_name(folder, tmp_path):
    runs = folder / "runs"
    write_results(runs / "lora/held_out.json", runs / "lora/adapter", ["Nobody.", "You."])
    write_results(tmp_path / "full.json", None, ["Nobody."], runs / "full/model")
    command = [f"run_dirs=[{runs}/lora,{runs}/full,{runs}/dpo]", f"output_file={tmp_path}/page.html"]
    code, out, err = compare(*command, f"evaluations=[{tmp_path}/full.json]")
    assert code == 0, err
    assert row_of(out, "answers' exact match").split()[3:] == ["50.0%", "of", "2", "100.0%", "of", "1", "-"]
    assert "the right answer" in (tmp_path / "page.html").read_text()

    os.utime(runs / "lora/held_out.json", (1, 1))
    code, out, _ = compare(*command)
    assert code == 0 and "held_out.json: older than" in out and "exact match" not in out
    (runs / "lora/held_out.json").unlink()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is not a file; name what evaluate.py wrote"),
        ("{}", "has no answers of an evaluation"),
        ("a" * 50, "has no answers of an evaluation"),
        ({"checkpoint_dir": "a", "adapter_dir": "b", "results": {}, "answers": []}, "has no answers of an evaluation"),
        ({"checkpoint_dir": "a", "adapter_dir": "b", "results": [], "answers": [1]}, "has no answers of an evaluation"),
        ("of another", "which is of none of the runs; leave it out"),
    ],
)
def test_what_is_no_evaluation_of_the_runs_is_one_line(folder, tmp_path, content, words):
    path = tmp_path / "results.json"
    if content == "of another":
        write_results(path, tmp_path / "adapter", ["Nobody."])
    elif content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    code, _, err = compare(f"run_dirs=[{folder}/runs/lora]", f"evaluations=[{path}]", f"output_file={tmp_path}/p.html")
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith(f"error: evaluations: '{path}'") and words in err
    assert not (tmp_path / "p.html").exists()
