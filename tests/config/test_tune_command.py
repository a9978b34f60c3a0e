"""`tune run`, `ls`, `cp` of our recipes, however they are named and from wherever."""

import shutil
from pathlib import Path

import pytest

from custom_components.config.recipe_files import Project, find_recipe, torchtune_names
from custom_components.config.tune_command import Run, copy, run_of
from custom_components.runtime.errors import UserError
from tests.support.paths import PROJECT, TINY_LLAMA
from tests.support.tune_process import python_process, write_tune

TINY, MERGE = "configs/tiny_qlora.yaml", "configs/merge.yaml"


@pytest.fixture
def tune(tmp_path):
    """Runs `tune` with arguments, in the project unless told otherwise."""
    script = write_tune(tmp_path)

    def run(*arguments, directory=PROJECT):
        return python_process(script, *arguments, directory=directory)

    return run


def run_from(directory, *arguments):
    return run_of(arguments, Project.around(directory))


@pytest.mark.parametrize(
    "name",
    [
        "recipes/merge.py",
        "./recipes/merge.py",
        "recipes//merge.py",
        str(PROJECT / "recipes/merge.py"),
        f"../{PROJECT.name}/recipes/merge.py",
        "recipes/merge",
        "recipes.merge",
        "merge.py",
        "merge",
    ],
)
@pytest.mark.parametrize("options", [["--config", TINY], [f"--config={TINY}"], ["lora_rank=4", "--config", TINY]])
def test_every_way_to_name_a_recipe_is_the_same_run(name, options):
    overrides = [option for option in options if option.startswith("lora")]
    assert run_from(PROJECT, name, *options) == Run(PROJECT, ["recipes/merge.py", "--config", TINY, *overrides])


@pytest.mark.parametrize("name", ["recipes/merge.py", "merge", str(PROJECT / "recipes/merge.py")])
@pytest.mark.parametrize("config", [MERGE, "merge.yaml", "merge", str(PROJECT / MERGE)])
def test_another_working_directory_finds_the_projects_recipes_and_configs(tmp_path, name, config, capsys):
    run = run_from(tmp_path, name, "--config", config)
    assert run == Run(PROJECT, ["recipes/merge.py", "--config", str(PROJECT / MERGE)])
    taken = [text for text in (name, config) if not Path(text).is_absolute()]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(taken)
    assert all(line.startswith(f"{text}: taken from {PROJECT}") for line, text in zip(lines, taken, strict=True))
    said_of_paths = [line.endswith(f"relative paths in it count from {tmp_path}") for line in lines]
    assert said_of_paths == [False] * (name in taken) + [True] * (
        config in taken[-1:] and not Path(config).is_absolute()
    )


def test_what_is_in_the_working_directory_comes_before_the_projects_own(tmp_path):
    for folder in ("recipes", "configs"):
        (tmp_path / folder).mkdir()
    shutil.copy(PROJECT / "recipes/merge.py", tmp_path / "recipes/merge.py")
    shutil.copy(PROJECT / TINY, tmp_path / TINY)
    assert run_from(tmp_path, "recipes/merge.py", "--config", TINY) == Run(
        tmp_path / "recipes", ["merge.py", "--config", TINY]
    )
    assert run_from(tmp_path / "recipes", "merge.py", "--config", "x").root == tmp_path / "recipes"
    (tmp_path / "recipes/__init__.py").touch()
    assert run_from(tmp_path / "recipes", "merge.py", "--config", "x").root == tmp_path


def test_options_of_torchrun_stay_before_the_recipe():
    run = run_from(PROJECT, "--nproc_per_node", "2", "./recipes/merge.py", "--config", TINY, "a=b")
    options = ("--nproc_per_node", "2")
    assert run == Run(PROJECT, [*options, "recipes/merge.py", "--config", TINY, "a=b"], options)


def test_the_estimate_for_several_devices_is_made_in_one_process():
    run = run_from(PROJECT, "--nproc_per_node", "4", "recipes/estimate.py", "--config", TINY)
    assert run == Run(PROJECT, ["recipes/estimate.py", "--config", TINY, "nproc_per_node=4"])


@pytest.mark.parametrize(
    "arguments",
    [["lora_finetune_single_device", "--config", "llama2/7B_lora_single_device"], ["--help"], [], ["--nnodes", "1"]],
)
def test_what_is_torchtunes_own_is_left_as_it_is(arguments):
    assert run_from(PROJECT, *arguments) == Run(None, arguments)


def test_torchtunes_names_are_those_of_its_registry():
    from torchtune._recipe_registry import get_all_recipes

    recipes = get_all_recipes()
    assert torchtune_names() == {r.name for r in recipes} | {c.name for r in recipes for c in r.configs}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recipes/merg.py", "--config", TINY], "recipe 'recipes/merg.py': no such file in .*did you mean 'recipes/me"),
        (["lora_finetune_single_devise", "--config", TINY], "did you mean 'lora_finetune_single_device'"),
        (["zzz", "--config", TINY], "`tune ls` lists"),
        (["recipes", "--config", TINY], "recipe 'recipes': no such file"),
        (["recipes/merge.py"], "--config is missing: tune run recipes/merge.py --config configs/merge.yaml"),
        (["recipes/merge.py", "--config"], "--config: name a file after it"),
        (["recipes/merge.py", "--config", "lora_rank=4"], "--config: name a file after it"),
        (["recipes/merge.py", "--config="], "--config: name a file after it"),
        (["--nproc_per_node", "2", "recipes/merg.py", "--config", TINY], "did you mean 'recipes/merge.py'"),
    ],
)
def test_what_cannot_be_run_is_said_with_what_to_type(arguments, words):
    with pytest.raises(UserError, match=words):
        run_from(PROJECT, *arguments)


def test_a_file_that_python_cannot_import_is_said(tmp_path):
    (tmp_path / "my.lora.py").touch()
    with pytest.raises(UserError, match="my.lora.py': cannot be imported by that name; call it NAME.py"):
        run_from(tmp_path, "my.lora.py", "--config", TINY)


def test_a_wheel_without_a_checkout_finds_files_and_says_where_recipes_are(tmp_path, monkeypatch):
    monkeypatch.setattr("custom_components.__file__", str(tmp_path / "site-packages/custom_components/__init__.py"))
    (tmp_path / "mine.py").touch()
    project = Project.around(tmp_path)
    assert project.path is None
    assert find_recipe("mine.py", project) == tmp_path / "mine.py"
    assert "checkout" in project.listing()
    with pytest.raises(UserError, match="no such file"):
        find_recipe("recipes/merge.py", project)


def test_errors_are_one_line_and_no_traceback(tune):
    result = tune("run", "recipes/nothing.py", "--config", TINY)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("error: recipe 'recipes/nothing.py'")


RECIPE = '''"""Say what was found.

tune run mine.py --config configs/tiny_qlora.yaml
"""
import sys
import custom_components, recipes
print(__name__, sys.argv[1:], custom_components.__file__, recipes.__file__)
'''


def test_a_recipe_elsewhere_runs_from_elsewhere_with_its_own_checkouts_components(tune, tmp_path):
    """Two checkouts, one of them installed: a recipe of the other gets the other's components."""
    other = tmp_path / "other checkout"
    for package in ("recipes", "custom_components"):
        (other / package).mkdir(parents=True)
        (other / package / "__init__.py").touch()
    (other / "recipes/mine.py").write_text(RECIPE)
    result = tune("run", other / "recipes/mine.py", "--config", TINY, "a=b", directory=tmp_path)
    assert result.returncode == 0, result.stderr
    said = f"__main__ ['--config', '{PROJECT / TINY}', 'a=b'] {other}/custom_components/__init__.py {other}/recipes/"
    assert result.stdout.startswith(said)


def test_ls_shows_our_recipes_and_configs_before_torchtunes(tune, tmp_path):
    result = tune("ls", directory=tmp_path)
    assert result.returncode == 0, result.stderr
    ours, theirs = result.stdout.split("of torchtune:")
    for file in [*PROJECT.glob("recipes/[!_]*.py"), *PROJECT.glob("configs/*.yaml")]:
        assert str(file.relative_to(PROJECT)) in ours
    assert "lora_finetune_single_device" in theirs
    assert all(len(line) <= 80 for line in ours.splitlines())


@pytest.mark.parametrize("name", ["recipes/generate.py", "generate.py", "generate", "./recipes/generate.py"])
def test_cp_copies_a_recipe_and_overwrites_nothing(tune, tmp_path, name):
    source = PROJECT / "recipes/generate.py"
    result = tune("cp", name, tmp_path / "mine")
    assert result.returncode == 0 and (tmp_path / "mine.py").read_bytes() == source.read_bytes()
    (tmp_path / "mine.py").write_text("changed")
    result = tune("cp", name, tmp_path / "mine.py")
    assert result.returncode == 2 and "is there already" in result.stderr
    assert tune("cp", "-n", name, tmp_path / "mine.py").returncode == 0
    assert (tmp_path / "mine.py").read_text() == "changed"
    assert "no such directory" in tune("cp", name, f"{tmp_path}/a/b/").stderr
    assert tune("cp", name, f"{tmp_path}/a/b/", "--make-parents").returncode == 0
    assert (tmp_path / "a/b" / source.name).exists()


def test_L33_cp_writes_through_no_link_and_to_no_empty_name(tmp_path, capsys, monkeypatch):
    def leave(exit_code):
        raise SystemExit(exit_code)

    monkeypatch.setattr("custom_components.config.tune_command.leave", leave)
    target, link = tmp_path / "elsewhere.py", tmp_path / "mine.py"
    link.symlink_to(target)

    def cp(*arguments):
        copy(["recipes/generate.py", *map(str, arguments)], Project.around(PROJECT))

    with pytest.raises(UserError, match="is there already"):
        cp(link)
    with pytest.raises(SystemExit):
        cp(link, "--no-clobber")
    assert "not copied" in capsys.readouterr().out
    assert link.is_symlink() and not target.exists()
    for empty in ("", " "):
        with pytest.raises(UserError, match="the destination '.?' is empty"):
            cp(empty)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written \(File exists\)"):
        cp(tmp_path / "file/mine.py", "--make-parents")


def test_cp_of_torchtunes_own_goes_on(tune, tmp_path):
    result = tune("cp", "llama2/7B_lora", tmp_path / "theirs.yaml")
    assert result.returncode == 0 and (tmp_path / "theirs.yaml").exists(), result.stderr


def test_cat_and_validate_find_our_configs(tune, tmp_path):
    assert "checkpoint_dir: examples/tiny_llama/checkpoint" in tune("cat", "tiny_qlora", directory=tmp_path).stdout


def test_a_recipe_copied_and_changed_runs(tune, tmp_path):
    """As README says, in the checkout's recipes/; the checkout is a copy here."""
    for name in ("custom_components", "configs", "examples"):
        (tmp_path / name).symlink_to(PROJECT / name)
    (tmp_path / "recipes").mkdir()
    for name in ("__init__.py", "lora_single_device.py"):
        shutil.copy(PROJECT / "recipes" / name, tmp_path / "recipes")
    text = (tmp_path / "recipes/lora_single_device.py").read_text()
    changed = text.replace("def recipe_main() -> None:", 'def recipe_main() -> None:\n    print("changed")')
    (tmp_path / "recipes/my_lora.py").write_text(changed)
    options = ["epochs=1", "max_steps_per_epoch=1", "dataset_val=null", "run_val_every_n_steps=null", "cache_dir=null"]
    result = tune("run", "recipes/my_lora.py", "--config", TINY, "device=cpu", *options, directory=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("changed\n")
    assert (tmp_path / "outputs/tiny_qlora/adapter/adapter_model.safetensors").exists()


def test_a_recipe_copied_to_a_folder_of_ones_own_runs(tune, tmp_path):
    shutil.copy(PROJECT / "recipes/preview.py", tmp_path / "my_preview.py")
    result = tune("run", "my_preview.py", "--config", "tiny_qlora", directory=tmp_path)
    assert result.returncode == 2 and "'examples/tiny_llama/checkpoint' is not a directory" in result.stderr
    options = [
        f"checkpoint_dir={TINY_LLAMA}/checkpoint",
        f"dataset.source={TINY_LLAMA}/data/val.jsonl",
        f"dataset_val.source={TINY_LLAMA}/data/val.jsonl",
        "cache_dir=null",
    ]
    result = tune("run", "my_preview.py", "--config", "tiny_qlora", *options, directory=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("---- row 0")


def test_a_package_of_the_same_name_without_our_command_leaves_tune_alone(tune, tmp_path):
    """`custom_components` is a name that other torchtune projects use too."""
    (tmp_path / "custom_components").mkdir()
    (tmp_path / "custom_components/__init__.py").touch()
    result = python_process(tmp_path / "bin/tune", "ls", first_path=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Error processing" not in result.stderr and "of torchtune:" not in result.stdout
