"""L33: what is overwritten is only what a command of ours wrote and is recognised by."""

import shutil

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from custom_components.runs.run_directory import begin_in, run_directory
from custom_components.runtime.errors import UserError
from tests.support.checkpoints import write_checkpoint
from tests.support.paths import PROJECT, snapshot
from tests.support.recipe_runs import arguments, run_here
from tests.support.rows import random_dialogs, write_dialogs


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A folder with a base, rows, and a finished run in `out` that has written everything a run can."""
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder / "base")
    write_dialogs(folder / "rows.jsonl", random_dialogs(12))
    code, _, err = run_here("lora_single_device", *training(folder))
    assert code == 0, err
    return folder


def training(folder, *overrides):
    """The arguments of that run."""
    few_steps = ["epochs=2", "max_steps_per_epoch=2", "save_every_n_steps=1", "val_fraction=0.2", "lora_rank=2"]
    config, path, *rest = arguments(folder / "base", folder / "rows.jsonl", folder / "out", *few_steps)
    return [config, str(PROJECT / path), *rest, "sample_prompts=['Who?']", *overrides]


@pytest.fixture
def out(run, tmp_path):
    """A copy of the run's directory."""
    return shutil.copytree(run / "out", tmp_path / "out")


def nothing_logged(*_):
    """In place of a metric logger."""


def overwrite(out):
    """What a run does with the directory that it replaces."""
    with run_directory(out, overwrite=True, resumes=False) as directory:
        begin_in(directory, "new: true\n", nothing_logged, overwrites=True)


def test_overwriting_removes_all_of_a_run_and_only_that(out):
    results = ["adapter", "checkpoints", "config.yaml", "loss.png", "metrics.jsonl", "samples.jsonl"]
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == results
    assert len(list((out / "checkpoints").iterdir())) == 2
    for name in (
        "notes.txt",
        "checkpoints/Llama/model.safetensors",
        "merged/merge.yaml",
        ".step_000001.writing-x",
    ):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("of others")
    foreign = {path for path in out.rglob("*") if path.is_file() and path.read_bytes() == b"of others"}
    overwrite(out)
    assert {path for path in out.rglob("*") if path.is_file()} == {*foreign, out / "config.yaml", out / ".lock"}
    assert (out / "config.yaml").read_text() == "new: true\n"
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["Llama"]


IN_THE_WAY = {
    "config.yaml": "checkpoint_dir: mine # a comment\noutput_dir: out\n",
    "metrics.jsonl": '{"mine": 1}\n',
    "samples.jsonl": "mine",
    "loss.png": "mine",
    "adapter": "a file",
    "adapter/notes.txt": "mine",
    "adapter/README.md": "# My adapter\n",
    "adapter/adapter_config.json": '{"peft_type": "LORA", "auto_mapping": null}',
    "adapter/adapter_model.safetensors": "mine",
    "adapter/adapter_model.bin": "mine",
    "adapter/runs": "mine",
    "checkpoints": "a file",
    "checkpoints/step_000003/notes.txt": "mine",
    "checkpoints/step_000003/state.pt": "mine",
    "checkpoints/step_000004/adapter/more of mine": "mine",
    "checkpoints/step_000100": "a file",
    "checkpoints/step_000100/model.safetensors": "mine",
}


def put(path, content):
    """Write a file where perhaps something else is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


@pytest.mark.parametrize("name", IN_THE_WAY)
@pytest.mark.parametrize("resumes", [False, True])
def test_L33_what_is_in_the_way_of_a_run_is_named_and_stays(run, out, name, resumes):
    put(out / name, IN_THE_WAY[name])
    before = snapshot(out)
    words = f"output_dir: '.*{name}' is not, as it is, what a run of this project wrote, .*; move it, or name another"
    with pytest.raises(UserError, match=words), run_directory(out, overwrite=not resumes, resumes=resumes):
        raise AssertionError
    assert snapshot(out) == before
    if not resumes and name in ("config.yaml", "adapter/notes.txt", "checkpoints/step_000100"):
        overwriting = training(run, f"output_dir={out}", "overwrite_output_dir=true", "dataset.source=nothing.jsonl")
        code, _, err = run_here("lora_single_device", *overwriting)
        assert code == 2 and len(err.splitlines()) == 1 and f"{name}' is not" in err  # before the data is read
        assert snapshot(out) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "loss.png", "adapter", "checkpoints/step_000003"])
def test_L33_results_without_a_run_s_config_are_not_known_to_be_a_run_s(out, name):
    """An adapter that was downloaded to where a run will be written, for example."""
    for result in list(out.iterdir()):
        if result.name not in (".lock", name.partition("/")[0]):
            shutil.rmtree(result) if result.is_dir() else result.unlink()
    before = snapshot(out)
    with pytest.raises(UserError, match="is not, as it is, what a run"):
        overwrite(out)
    assert snapshot(out) == before


LINKABLE = [
    *("config.yaml", "metrics.jsonl", "samples.jsonl", "loss.png", "adapter", "checkpoints", "checkpoints/step_000003"),
    *(
        "checkpoints/step_000004/state.pt",
        "checkpoints/step_000004/adapter",
        "adapter/adapter_model.safetensors",
        ".lock",
    ),
]


@pytest.mark.parametrize("name", LINKABLE)
@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("dangles", [False, True])
def test_L33_nothing_is_deleted_or_written_through_a_link(out, tmp_path, name, resumes, dangles):
    """Also where what the link leads to would be ours."""
    elsewhere = tmp_path / "elsewhere"
    (out / name).rename(elsewhere)
    if name == ".lock":
        elsewhere.write_text("mine")
    (out / name).symlink_to("nothing" if dangles else elsewhere)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="output_dir: "):  # noqa: SIM117 - the block must not be reached
        with run_directory(out, overwrite=not resumes, resumes=resumes) as directory:
            begin_in(directory, "new: true\n", nothing_logged, overwrites=not resumes)
    assert snapshot(tmp_path) == before


def test_L33_an_output_dir_that_is_a_link(out, tmp_path):
    """A run may begin in an empty directory behind a link; none is overwritten through one."""
    link = tmp_path / "link"
    link.symlink_to(out, target_is_directory=True)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=rf"output_dir: '{link}' is a link, .* name '{out}'"):
        overwrite(link)
    assert snapshot(tmp_path) == before
    with run_directory(link, overwrite=False, resumes=True):
        pass
    (tmp_path / "empty").mkdir()
    link.unlink()
    link.symlink_to("empty", target_is_directory=True)
    overwrite(link)


def test_L33_a_lock_file_that_is_not_ours_keeps_its_content(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.lock").write_text("mine")
    overwrite(tmp_path / "out")
    assert (tmp_path / "out/.lock").read_text() == "mine"


@pytest.mark.parametrize("name", ["config.yaml", "checkpoints/step_000003/config.yaml"])
def test_L33_a_config_that_a_person_changed_is_not_a_run_s(out, name):
    with (out / name).open("a") as file:
        file.write("# the best one so far\n")
    before = snapshot(out)
    with pytest.raises(UserError, match="config.yaml' is not, as it is"):
        overwrite(out)
    assert snapshot(out) == before


def test_what_a_power_cut_left_of_a_checkpoint_is_replaced(out):
    """A damaged newest checkpoint is passed over, and must not keep a run from going on."""
    step = out / "checkpoints/step_000004"
    (step / "state.pt").write_bytes(b"\0" * 1000)
    (step / "adapter/adapter_model.safetensors").write_bytes(b"")
    with run_directory(out, overwrite=False, resumes=True):
        pass
    overwrite(out)
    assert not step.exists()


NAMES = [
    *("adapter", "checkpoints", "config.yaml", "metrics.jsonl", "loss.png", "README.md", "step_000003", "step_000009"),
    *("state.pt", "adapter_model.safetensors", "mine", ".adapter.writing", ".step_000003.replaced-by-me", ".lock"),
]


@settings(
    deadline=None, max_examples=40, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join),
            st.binary(min_size=1, max_size=40),
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda file: file[0],
    ),
    st.booleans(),
)
def test_L33_no_foreign_byte_changes_wherever_it_is(run, tmp_path, files, resumes):
    """Files, and directories behind links, of our names and others, at random places of a run's directory."""
    out, elsewhere = tmp_path / "any", tmp_path / "elsewhere"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(elsewhere, ignore_errors=True)
    shutil.copytree(run / "out", out)
    elsewhere.mkdir()
    foreign = {}
    for name, content, is_linked in files:
        path = out / name
        if path.is_dir() or any(parent.is_file() for parent in path.parents if parent != out):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_linked:
            path.unlink(missing_ok=True)
            target = elsewhere / str(len(foreign))
            target.write_bytes(content)
            path.symlink_to(target)
            foreign[target] = content
        else:
            path.write_bytes(content)
        foreign[path] = content
    try:
        with run_directory(out, overwrite=not resumes, resumes=resumes) as directory:
            begin_in(directory, "new: true\n", nothing_logged, overwrites=not resumes)
    except UserError:
        pass
    assert {path: path.read_bytes() if path.exists() else None for path in foreign} == foreign


def test_a_run_overwrites_its_own_and_stays_whole_until_its_first_step(run, out, monkeypatch):
    """A run that cannot begin leaves the results of the one before."""
    before = snapshot(out)
    again = training(run, f"output_dir={out}", "overwrite_output_dir=true", "max_steps_per_epoch=1")
    code, _, err = run_here("lora_single_device", *again, "resume_from_checkpoint=nothing")
    assert code == 2 and snapshot(out) == before
    code, _, err = run_here("lora_single_device", *again)
    assert code == 0, err
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
