"""L33: merges, files of answers and results, caches and old checkpoints: only what is known to be ours is replaced."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from custom_components.datasets.token_cache import TokenCache
from custom_components.export.merge_output import restore_replaced
from custom_components.runs.checkpoints import delete_checkpoints_after
from custom_components.runtime.atomic_files import whole_directory, whole_file
from custom_components.runtime.errors import UserError
from tests.support.adapters import saved_adapter
from tests.support.checkpoints import write_checkpoint
from tests.support.models import loaded_model, with_random_adapters
from tests.support.paths import PROJECT, snapshot
from tests.support.recipe_runs import run_here, run_merge
from tests.support.rows import write_dialogs
from tests.support.written_runs import step_records, write_run


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A folder with a base, an adapter on it, a merge of both, rows, and a run."""
    folder = tmp_path_factory.mktemp("adapted")
    base = write_checkpoint(folder / "base")
    saved_adapter(with_random_adapters(loaded_model(base, lora_rank=2)), folder / "adapter")
    code, _, err = run_merge(**merging(folder, folder / "merged"))
    assert code == 0, err
    write_dialogs(folder / "rows.jsonl", [("Who?", "Nobody.")])
    write_run(folder / "run", records=step_records([3.0, 2.0]))
    return folder


def merging(folder: Path, output_dir: Path) -> dict[str, object]:
    read = {"checkpoint_dir": folder / "base", "adapter_dir": folder / "adapter"}
    return {**read, "output_dir": output_dir, "prove": "false", "overwrite_output_dir": "true"}


@pytest.fixture
def merged(adapted, tmp_path):
    """A copy of the merge."""
    return shutil.copytree(adapted / "merged", tmp_path / "merged")


def test_a_merge_replaces_a_merge(adapted, merged):
    before = snapshot(merged)
    (merged.parent / ".merged.writing-1").mkdir()
    (merged.parent / ".merged.writing-1/model.safetensors").write_bytes(b"half")
    code, _, err = run_merge(**merging(adapted, merged))
    assert code == 0, err
    assert snapshot(merged) == before and list(merged.parent.iterdir()) == [merged]


@pytest.mark.parametrize("format", ["hugging_face", "gguf", "gguf_lora"])
def test_everything_that_a_killed_merge_wrote_goes(adapted, tmp_path, format):
    if format != "hugging_face":
        pytest.importorskip("gguf")
    code, _, err = run_merge(**merging(adapted, tmp_path / "merged"), format=format)
    assert code == 0, err
    shutil.copytree(tmp_path / "merged", tmp_path / ".merged.writing-12")
    restore_replaced(tmp_path / "merged")
    assert list(tmp_path.iterdir()) == [tmp_path / "merged"]
    assert run_merge(**merging(adapted, tmp_path / "merged"), format=format)[0] == 0


@pytest.mark.parametrize(
    "name", ["notes.txt", "more/notes.txt", "merged-f16.gguf", "README.md", "config.json", "model.safetensors"]
)
def test_L33_a_merge_with_something_else_in_it_stays(adapted, merged, name):
    """A file that was added, and one that was changed since, a card for example."""
    (merged / name).parent.mkdir(exist_ok=True)
    (merged / name).write_text("mine")
    before = snapshot(merged)
    code, _, err = run_merge(**merging(adapted, merged))
    assert code == 2 and len(err.splitlines()) == 1
    assert f"{merged / name.partition('/')[0]}' is not, as it is, what the merge wrote" in err
    assert snapshot(merged.parent) == {merged: "directory", **before}


@pytest.mark.parametrize("record", ["", "mine", "files: [a]", "adapters: []", "base_model: a\nadapters: []\n"])
def test_L33_a_directory_without_a_merge_s_record_stays(adapted, merged, record):
    (merged / "merge.yaml").write_text(record)
    before = snapshot(merged)
    code, _, err = run_merge(**merging(adapted, merged))
    assert code == 2 and "is not empty, and is no merged model" in err
    assert snapshot(merged) == before


@pytest.mark.parametrize("target", ["merged", "empty", "nothing"])
def test_L33_no_merge_is_written_in_place_of_a_link(adapted, merged, tmp_path, target):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(target)
    before = snapshot(tmp_path)
    code, _, err = run_merge(**merging(adapted, tmp_path / "link"))
    assert code == 2 and f"name '{tmp_path / target}'" in err
    assert snapshot(tmp_path) == before


def test_L33_what_looks_like_an_unfinished_merge_and_is_not_stays(adapted, merged, tmp_path):
    for name in (".merged.writing-mine/a", ".merged.replaced-2020/a", ".merged.writing-3/more/a", ".other.writing-1/a"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "of others").mkdir()
    (tmp_path / "of others/model.safetensors").write_text("mine")
    (tmp_path / ".merged.writing-4").symlink_to("of others")
    before = snapshot(tmp_path)
    assert run_merge(**merging(adapted, merged))[0] == 0
    assert snapshot(tmp_path) == before


def evaluation(folder: Path, output_file: Path) -> list[str]:
    return [
        *("--config", str(PROJECT / "configs/evaluate.yaml"), f"checkpoint_dir={folder / 'base'}", "cache_dir=null"),
        *(f"dataset.source={folder / 'rows.jsonl'}", "device=cpu", f"output_file={output_file}"),
    ]


def answering(folder: Path, output_file: Path) -> list[str]:
    return [
        *("--config", str(PROJECT / "configs/generate.yaml"), f"checkpoint_dir={folder / 'base'}", "device=cpu"),
        *(f"prompts_file={folder / 'rows.jsonl'}", f"output_file={output_file}", "max_new_tokens=1"),
    ]


def previewing(folder: Path, output_file: Path) -> list[str]:
    return [
        *("--config", str(PROJECT / "configs/llama_qlora.yaml"), f"checkpoint_dir={folder / 'base'}", "cache_dir=null"),
        *(f"dataset.source={folder / 'rows.jsonl'}", f"output_file={output_file}"),
    ]


def comparing(folder: Path, output_file: Path) -> list[str]:
    config = str(PROJECT / "configs/compare_runs.yaml")
    return ["--config", config, f"run_dirs=[{folder / 'run'}]", f"output_file={output_file}"]


WRITERS = {"evaluate": evaluation, "generate": answering, "preview": previewing, "compare_runs": comparing}
CONFIGS = {
    **{"evaluate": "evaluate.yaml", "generate": "generate.yaml"},
    **{"preview": "llama_qlora.yaml", "compare_runs": "compare_runs.yaml"},
}


@pytest.mark.parametrize("recipe", WRITERS)
def test_an_earlier_output_file(adapted, tmp_path, recipe):
    """Results of an evaluation and the pages of a preview and a comparison make way for the next; answers never."""
    command = [recipe, *WRITERS[recipe](adapted, tmp_path / "out.json")]
    assert run_here(*command)[0] == 0
    before = snapshot(tmp_path)
    code, _, err = run_here(*command)
    assert code == (2 if recipe == "generate" else 0), err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("recipe", WRITERS)
@pytest.mark.parametrize("content", ["", "mine", "{}", '{"results": 1}', "[1]", "<!doctype html>\n<title>Rows"])
def test_L33_an_output_file_replaces_nothing_of_others(adapted, tmp_path, recipe, content):
    path = tmp_path / "out.json"
    path.write_text(content)
    code, _, err = run_here(recipe, *WRITERS[recipe](adapted, path))
    assert code == 2 and err.startswith(f"error: output_file: '{path}' exists") and "name another" in err
    assert snapshot(tmp_path) == {path: content.encode()}


@pytest.mark.parametrize("recipe", WRITERS)
@pytest.mark.parametrize(
    "name", ["rows.jsonl", "base/config.json", "base/tokenizer.model", "adapter/adapter_config.json", "base", "link"]
)
def test_L33_an_output_file_is_never_what_is_read(adapted, tmp_path, recipe, name):
    """A link as well: to what is read, to an earlier file of results, or to nothing."""
    folder = shutil.copytree(adapted, tmp_path / "copy")
    results = tmp_path / "results.json"
    assert run_here("evaluate", *evaluation(folder, results))[0] == 0
    targets = ["rows.jsonl", results, "nothing"] if name == "link" else [None]
    for target in targets:
        if target is not None:
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(target)
        before = snapshot(tmp_path)
        code, _, err = run_here(recipe, *WRITERS[recipe](folder, folder / name))
        assert code == 2 and err.startswith("error: output_file: ") and len(err.splitlines()) == 1, err
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["run/config.yaml", "run/metrics.jsonl", "run"])
def test_L33_no_comparison_is_written_over_what_a_run_wrote(adapted, name):
    before = snapshot(adapted)
    code, _, err = run_here("compare_runs", *comparing(adapted, adapted / name))
    assert code == 2 and err.startswith("error: output_file: ") and len(err.splitlines()) == 1
    assert snapshot(adapted) == before


@pytest.mark.parametrize("recipe", WRITERS)
def test_L33_the_config_is_no_output_file(adapted, tmp_path, recipe):
    config = tmp_path / "mine.yaml"
    shutil.copyfile(PROJECT / "configs" / CONFIGS[recipe], config)
    before = config.read_bytes()
    _, _, *overrides = WRITERS[recipe](adapted, config)
    code, _, err = run_here(recipe, "--config", str(config), *overrides)
    assert code == 2 and "exists" in err and config.read_bytes() == before


def test_an_output_file_may_be_beside_what_is_read(adapted, tmp_path):
    folder = shutil.copytree(adapted, tmp_path / "copy")
    for recipe in WRITERS:
        assert run_here(recipe, *WRITERS[recipe](folder, folder / f"{recipe}.json"))[0] == 0


def test_L33_a_damaged_cache_is_replaced_but_nothing_of_others_in_it(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("{}")
    cache = TokenCache(tmp_path / "cache", [tmp_path / "rows.jsonl"], [])
    cache.store({"tokens": np.arange(5)}, {"rows": 1})
    [directory] = (tmp_path / "cache/tokens").iterdir()
    (directory / "tokens.npy").write_bytes(b"damaged")
    cache.store({"tokens": np.arange(5)}, {"rows": 1})
    assert cache.load() is not None
    (directory / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    cache.store({"tokens": np.arange(6)}, {"rows": 1})
    assert "the tokens are not kept" in capsys.readouterr().out and snapshot(tmp_path) == before
    (directory / "notes.txt").unlink()
    directory.rename(tmp_path / "elsewhere")
    directory.symlink_to(tmp_path / "elsewhere")
    before = snapshot(tmp_path)
    cache.store({"tokens": np.arange(6)}, {"rows": 1})
    assert "the tokens are not kept" in capsys.readouterr().out and snapshot(tmp_path) == before


def test_L33_old_checkpoints_go_and_what_others_put_there_stays(tmp_path):
    """Also while a run goes on, when nobody looks."""
    checkpoints = tmp_path / "checkpoints"
    for step in (1, 2, 3, 999_999, 1_000_000):
        (checkpoints / f"step_{step:06}").mkdir(parents=True)
        torch.save({}, checkpoints / f"step_{step:06}/state.pt")
    (checkpoints / "step_000002/notes.txt").write_text("mine")
    (checkpoints / "step_000003").rename(tmp_path / "elsewhere")
    (checkpoints / "step_000003").symlink_to(tmp_path / "elsewhere")
    delete_checkpoints_after(tmp_path, 999_999)
    assert not (checkpoints / "step_1000000").exists() and (checkpoints / "step_999999/state.pt").exists()
    delete_checkpoints_after(tmp_path, 0)
    assert {path.name for path in checkpoints.rglob("*")} == {"step_000002", "notes.txt", "step_000003"}
    assert (tmp_path / "elsewhere/state.pt").exists()


@pytest.mark.parametrize("is_link", [False, True])
def test_L33_a_directory_is_replaced_only_by_one_of_the_same_names(tmp_path, is_link):
    path = tmp_path / "a"
    (tmp_path / "elsewhere" if is_link else path).mkdir()
    if is_link:
        path.symlink_to("elsewhere")
    for name in ("file", "mine"):
        (path / name).write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="is in the way"), whole_directory(path) as directory:
        (directory / "file").write_text("new")
    assert snapshot(tmp_path) == before


def test_L33_a_file_is_not_replaced_through_a_link_nor_in_its_place(tmp_path):
    (tmp_path / "mine").write_text("mine")
    for link in ("a", ".b.writing"):
        (tmp_path / link).symlink_to("mine")
    with pytest.raises(OSError, match="it is a link"), whole_file(tmp_path / "a") as path:
        path.write_text("new")
    with whole_file(tmp_path / "b") as path:
        path.write_text("new")
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "b").read_text() == "new"
