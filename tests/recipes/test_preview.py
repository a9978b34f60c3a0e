"""What preview shows is what is trained."""

import json

from custom_components.datasets.chat import chat_dataset
from custom_components.datasets.row_preview import label_table, length_histogram, rendered_row
from tests.support.paths import TINY_TOKENIZER
from tests.support.recipe_runs import tune_run


def test_supervised_text_is_set_apart(tmp_path, tiny_tokenizer):
    source = tmp_path / "rows.jsonl"
    dialog = [{"role": "user", "content": "Où?"}, {"role": "assistant", "content": "Là  bas."}]
    source.write_text(json.dumps({"messages": dialog}))
    [row] = chat_dataset(tiny_tokenizer, str(source))
    assert rendered_row(row, tiny_tokenizer, colour=False) == "<s> [INST] Où? [/INST]⟦ Là  bas. </s>⟧"
    assert "\033[32m Là  bas. </s>\033[0m" in rendered_row(row, tiny_tokenizer, colour=True)
    table = label_table(row, tiny_tokenizer).splitlines()
    assert len(table) == len(row["tokens"])
    assert sum(line.endswith("trained") for line in table) == sum(label >= 0 for label in row["labels"])


def test_histogram_counts_every_row():
    lines = length_histogram([1, 1, 5, 99]).splitlines()
    assert sum(int(line.split()[-1]) for line in lines if "#" in line) == 4
    assert all(len(line) <= 80 for line in length_histogram(list(range(8000))).splitlines())


def test_preview_needs_only_tokenizer_and_data(tmp_path):
    """No checkpoint, no training: rows, counts, histogram and steps."""
    common = [
        *("--config", "configs/tiny_qlora.yaml", f"tokenizer.path={TINY_TOKENIZER}", "checkpoint_dir=not/there/yet"),
        *("model.checkpoint_dir=not/there/yet", f"output_dir={tmp_path / 'out'}", "cache_dir=null"),
    ]
    result = tune_run(*common, recipe="preview")
    assert result.returncode == 0, result.stderr
    for words in (
        "---- row 2:",
        "⟦ ",
        "1200 rows, 1200 kept",
        "rows by tokens",
        "150 optimizer steps, 5 of them warm-up",
    ):
        assert words in result.stdout
    assert not (tmp_path / "out").exists()
    result = tune_run(*common, "row=7", recipe="preview")
    assert "---- row 7:" in result.stdout and "trained" in result.stdout
    result = tune_run(*common, "row=5000", recipe="preview")
    assert result.returncode == 2 and "the rows 0 to 1199" in result.stderr
