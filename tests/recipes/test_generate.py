"""The generate recipe: several answers to one prompt."""

import json

import pytest

from tests.support.paths import TINY_LLAMA
from tests.support.recipe_runs import tune_run

PROMPTS = ["Who?", "What is the colour of the sky?"]


def answers(*overrides: str) -> str:
    result = tune_run(
        *("--config", "configs/generate.yaml", f"checkpoint_dir={TINY_LLAMA / 'checkpoint'}", "device=cpu"),
        *("max_new_tokens=12", "temperature=1.5", *overrides),
        recipe="generate",
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_several_answers_are_those_of_the_seeds_from_the_first_on(tmp_path):
    """In print, and in a file as a list beside its row."""
    shown = answers(f"prompt={PROMPTS[0]}", "num_answers=3", "seed=5")
    labels, texts = zip(*(line.split("  ", 1) for line in shown.splitlines()), strict=True)
    assert labels == ("1", "2", "3")
    assert len(set(texts)) == 3
    assert [answers(f"prompt={PROMPTS[0]}", f"seed={seed}").rstrip("\n") for seed in (5, 6, 7)] == list(texts)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    output = tmp_path / "answers.jsonl"
    files = (f"prompts_file={tmp_path / 'prompts.jsonl'}", f"output_file={output}")
    assert "6 answers in" in answers(*files, "num_answers=3", "seed=5")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    assert rows[0]["answers"] == list(texts) and len(set(rows[1]["answers"])) == 3
    assert "answer" not in rows[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["prompt=Who?", "num_answers=2"], "at temperature 0 are all the same answer"),
        (["chat=true", "temperature=1", "num_answers=2"], "beside chat"),
        (["prompt=Who?", "num_answers=0"], "num_answers"),
    ],
)
def test_L26_numbers_of_answers_that_cannot_be(overrides, words):
    result = tune_run("--config", "configs/generate.yaml", *overrides, recipe="generate")
    assert result.returncode == 2 and words in result.stderr
