"""L16 to L20, L30: a run that was stopped anywhere goes on as if it had not been."""

import errno
import random
import shutil
import signal
import time

import pytest
import torch
import yaml

from custom_components.config.lora_settings import LoRASettings
from custom_components.config.reading import load_settings
from custom_components.runs.checkpoints import save_run_checkpoint
from custom_components.runs.resuming import open_run_to_resume
from custom_components.runs.trained_weights import AdapterWeights
from custom_components.runtime.errors import UserError
from custom_components.training.state import Progress, TrainingState
from tests.support.checkpoints import write_checkpoint
from tests.support.forked_tune import ForkedTune
from tests.support.models import loaded_model, with_random_adapters
from tests.support.paths import PROJECT
from tests.support.recipe_runs import RECIPES, arguments, full_arguments, tune_run
from tests.support.rows import random_dialogs, write_dialogs
from tests.support.run_results import assert_equal, outcome, records

TRAINING = ("run", "recipes/lora_single_device.py")
ADAPTER_RECIPES = ("lora_single_device", "lora_dpo_single_device")
# Dropout, packs, several epochs, validation, a partial last window: what an exact resume has to bring back.
RUN = [
    *("epochs=3", "lora_dropout=0.2", "packed=true", "max_seq_len=64", "batch_size=1", "gradient_accumulation_steps=2"),
    *("save_every_n_steps=2", "val_fraction=0.2", "run_val_every_n_steps=3", "neftune_noise_alpha=5"),
    *("rank_pattern={k_proj: 3}", "alpha_pattern={k_proj: 5}", "layers_to_transform=[1]"),
]


def num_records(output_dir):
    metrics = output_dir / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def kill_chain(run, output_dir, num_kills, seed, recipe="lora_single_device"):
    """Kill a run again and again, each time a random moment after it got further, and let it finish at last."""
    generator = random.Random(seed)

    def resumes_or_begins():
        has_checkpoint = any((output_dir / "checkpoints").glob("step_*"))
        return "resume_from_checkpoint=true" if has_checkpoint else "overwrite_output_dir=true"

    for _ in range(num_kills):
        flag = resumes_or_begins()
        (output_dir / "metrics.jsonl").unlink(missing_ok=True) if flag.startswith("overwrite") else None
        before = num_records(output_dir)
        process = ForkedTune("run", f"recipes/{recipe}.py", *run, flag)
        while process.poll() is None and num_records(output_dir) <= before:
            time.sleep(0.001)
        time.sleep(generator.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.result()
    result = tune_run(*run, resumes_or_begins(), recipe=recipe)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("num_kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_L17_killed_anywhere_and_resumed_is_bit_equal_to_never_stopped(make_checkpoint, many_rows, tmp_path, num_kills):
    checkpoint = make_checkpoint()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = tune_run(*arguments(checkpoint, many_rows, whole, *RUN))
    assert result.returncode == 0, result.stderr
    kill_chain(arguments(checkpoint, many_rows, killed, *RUN), killed, num_kills, seed=num_kills)
    assert_equal(outcome(whole), outcome(killed))


# The best is a checkpoint of its own, and the optimizer's step is in the backward or not.
FULL_RUN = ["epochs=3", "save_every_n_steps=2", "val_fraction=0.2", "run_val_every_n_steps=3", "batch_size=8"]


@pytest.mark.parametrize(
    ("num_kills", "overrides"),
    [
        (1, ()),
        pytest.param(10, ("gradient_accumulation_steps=2",), marks=pytest.mark.slow),
        pytest.param(5, ("optimizer_in_backward=true", "clip_grad_norm=null"), marks=pytest.mark.slow),
    ],
)
def test_L17_a_killed_full_fine_tuning_ends_as_one_never_stopped(
    make_checkpoint, many_rows, tmp_path, num_kills, overrides
):
    checkpoint, whole, killed = make_checkpoint(), tmp_path / "whole", tmp_path / "killed"
    result = tune_run(*full_arguments(checkpoint, many_rows, whole, *FULL_RUN, *overrides), recipe="full_single_device")
    assert result.returncode == 0, result.stderr
    run = full_arguments(checkpoint, many_rows, killed, *FULL_RUN, *overrides)
    kill_chain(run, killed, num_kills, num_kills, recipe="full_single_device")
    assert_equal(outcome(whole), outcome(killed))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Two epochs of three steps, run once; its folder holds the base, the rows and the output."""
    folder = tmp_path_factory.mktemp("finished")
    write_checkpoint(folder / "base")
    write_dialogs(folder / "rows.jsonl", random_dialogs(40))
    result = tune_run(*run_in(folder))
    assert result.returncode == 0, result.stderr
    return folder


def run_in(folder):
    return arguments(folder / "base", folder / "rows.jsonl", folder / "out", "max_steps_per_epoch=3", "epochs=2")


@pytest.fixture
def short_run(finished_run, tmp_path):
    """A copy of the finished run elsewhere, as on another machine."""
    shutil.copytree(finished_run, tmp_path / "copy")
    return run_in(tmp_path / "copy"), tmp_path / "copy/out"


def test_L17_from_another_machines_directories(short_run, finished_run):
    """Checkpoint, data and output elsewhere: the first epoch's checkpoint goes on there to the same end."""
    run, output_dir = short_run
    result = tune_run(*run, f"resume_from_checkpoint={output_dir / 'checkpoints/step_000003'}")
    assert result.returncode == 0, result.stderr
    assert_equal(outcome(finished_run / "out"), outcome(output_dir))


def test_L18_from_an_older_checkpoint_the_newer_ones_go(short_run):
    """The run branches off: what was trained after the older checkpoint is not picked up again."""
    run, output_dir = short_run
    older = output_dir / "checkpoints/step_000003"
    result = tune_run(*run, f"resume_from_checkpoint={older}", "optimizer.lr=1e-5", "save_every_n_steps=1")
    assert result.returncode == 0, result.stderr
    assert [path.name for path in sorted((output_dir / "checkpoints").iterdir())] == ["step_000005", "step_000006"]
    rates = [record["lr"] for record in outcome(output_dir)[0]]
    assert rates[2] > 1e-5 >= rates[3]


def test_a_checkpoint_of_another_run_does_not_mix_with_the_run_that_lies_there(short_run, finished_run, tmp_path):
    run, output_dir = short_run
    elsewhere = finished_run / "out/checkpoints/step_000003"
    result = tune_run(*run, f"resume_from_checkpoint={elsewhere}")
    assert result.returncode == 2 and "holds the results of a run" in result.stderr
    result = tune_run(*run, f"resume_from_checkpoint={elsewhere}", f"output_dir={tmp_path / 'new'}")
    assert result.returncode == 0, result.stderr
    assert_equal(outcome(finished_run / "out"), outcome(tmp_path / "new"))


def test_a_finished_run_is_extended(short_run):
    run, output_dir = short_run
    result = tune_run(*run, "resume_from_checkpoint=true", "epochs=3")
    assert result.returncode == 0, result.stderr
    assert "going on from" in result.stdout and "epochs was 2, now 3" in result.stdout
    steps = [record["step"] for record in outcome(output_dir)[0]]
    assert steps == list(range(1, 10))


def test_L18_a_torn_checkpoint_is_passed_over(short_run):
    run, output_dir = short_run
    newest = output_dir / "checkpoints/step_000006/state.pt"
    newest.write_bytes(newest.read_bytes()[:-200])
    (output_dir / "checkpoints/.step_000009.writing-1").mkdir()
    assert open_run_to_resume(True, output_dir).path.name == "step_000003"
    result = tune_run(*run, f"resume_from_checkpoint={newest.parent}")
    assert result.returncode == 2 and "is not a whole checkpoint" in result.stderr


def test_L18_only_the_newest_and_the_best_are_kept(make_checkpoint, many_rows, tmp_path):
    """A rate that destroys what was learned makes the first validation the best."""
    run = arguments(make_checkpoint(), many_rows, tmp_path / "out", "epochs=5", "max_steps_per_epoch=2")
    result = tune_run(*run, "optimizer.lr=3.0", "val_fraction=0.2", "keep_last_n_checkpoints=2", "clip_grad_norm=null")
    assert result.returncode == 0, result.stderr
    kept = sorted(path.name for path in (tmp_path / "out/checkpoints").iterdir())
    best = torch.load(tmp_path / "out/checkpoints/step_000010/state.pt", weights_only=True)["progress"]["best_step"]
    assert kept == sorted({f"step_{best:06}", "step_000008", "step_000010"})


def config_of(*arguments, settings=LoRASettings):
    return load_settings(settings, list(arguments)).model_dump(mode="json")


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """A function that runs a recipe once, on fewer rows than a batch; it gives the run's arguments and output."""
    folders = {}

    def run_of(recipe):
        is_new = recipe not in folders
        folder = folders.setdefault(recipe, tmp_path_factory.mktemp(recipe) if is_new else None)
        small = RECIPES[recipe]
        run = small.arguments(folder / "base", folder / "rows.jsonl", folder / "out", "epochs=2")
        if is_new:
            write_checkpoint(folder / "base")
            small.write_rows(folder / "rows.jsonl", 1)
            result = tune_run(*run, recipe=recipe)
            assert result.returncode == 0, result.stderr
        return run, folder / "out"

    return run_of


def slow(*parameters):
    return pytest.param(*parameters, marks=pytest.mark.slow)


OF_ADAPTERS = ["lora_rank=8", "lora_attn_modules=[q_proj]"]
OF_ALL = ["seed=5", "batch_size=1", "packed=true"]


@pytest.mark.parametrize(
    ("recipe", "override"),
    [(recipe, override) for recipe in ADAPTER_RECIPES for override in OF_ADAPTERS]
    + [("full_single_device", "train_only=[norm]")]
    + [(recipe, override) for recipe in RECIPES for override in OF_ALL],
)
def test_L19_differences_that_change_shapes_or_order_are_refused(run_of, monkeypatch, recipe, override):
    run, output_dir = run_of(recipe)
    monkeypatch.chdir(PROJECT)
    settings = RECIPES[recipe].settings
    with pytest.raises(UserError, match=f"resume_from_checkpoint: {override.partition('=')[0]} was"):
        open_run_to_resume(True, output_dir).check_config(config_of(*run, override, settings=settings), settings)


@pytest.mark.parametrize("recipe", RECIPES)
def test_L19_other_differences_are_listed(run_of, monkeypatch, capsys, recipe):
    run, output_dir = run_of(recipe)
    monkeypatch.chdir(PROJECT)
    settings = RECIPES[recipe].settings
    before = config_of(*run, settings=settings)["optimizer"]["lr"]
    config = config_of(*run, "optimizer.lr=1e-5", "sample_prompts=[x]", settings=settings)
    open_run_to_resume(True, output_dir).check_config(config, settings)
    said = capsys.readouterr().out
    assert f"differs from the checkpoint: optimizer.lr was {before}, now 1e-05\n" in said
    assert "sample_prompts" not in said


def test_L19_a_key_that_the_run_was_begun_without_is_no_difference(short_run, monkeypatch, capsys):
    """A newer version has keys that an older run's config lacks."""
    run, output_dir = short_run
    monkeypatch.chdir(PROJECT)
    path = output_dir / "checkpoints/step_000006/config.yaml"
    before = yaml.safe_load(path.read_text())
    for values in (before, before["dataset"]):
        del values["on_empty_answer"]
    path.write_text(yaml.safe_dump(before, sort_keys=False))
    resumed = open_run_to_resume(True, output_dir)
    resumed.check_config(config_of(*run), LoRASettings)
    assert "on_empty_answer" not in capsys.readouterr().out
    resumed.check_config(
        load_settings(LoRASettings, [*run, "on_empty_answer=error"]).model_dump(mode="json"), LoRASettings
    )
    assert "on_empty_answer was None, now 'error'" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES)
def test_L19_other_rows_are_refused(run_of, tmp_path, recipe):
    run, _ = run_of(recipe)
    other = RECIPES[recipe].write_rows(tmp_path / "rows.jsonl", 2)
    result = tune_run(*run, "resume_from_checkpoint=true", f"dataset.source={other}", "epochs=3", recipe=recipe)
    assert result.returncode == 2 and "was trained on other rows" in result.stderr, result.stderr


@pytest.mark.parametrize("recipe", RECIPES)
def test_L10_rows_that_do_not_fill_a_batch_are_trained_on(run_of, recipe):
    _, output_dir = run_of(recipe)
    assert [record["step"] for record in records(output_dir)] == [1, 2]


SLOW_FOR_OTHERS = [recipe if recipe == "lora_single_device" else slow(recipe) for recipe in RECIPES]


@pytest.mark.parametrize("recipe", SLOW_FOR_OTHERS)
def test_L16_two_runs_are_bit_equal_and_another_seed_is_not(make_checkpoint, tmp_path, recipe):
    """With dropout, where there is an adapter; of a whole model only the order of the rows is drawn."""
    checkpoint, small = make_checkpoint(), RECIPES[recipe]
    rows = small.write_rows(tmp_path / "rows.jsonl", 5)
    overrides = ["epochs=2"] + (["lora_dropout=0.1"] if recipe in ADAPTER_RECIPES else [])
    results = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run = small.arguments(checkpoint, rows, tmp_path / name, f"seed={seed}", *overrides)
        result = tune_run(*run, recipe=recipe)
        assert result.returncode == 0, result.stderr
        results.append(outcome(tmp_path / name)[1])
    assert_equal(results[0], results[1])
    assert not any(torch.equal(results[0][key], results[2][key]) for key in results[0])


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="no whole checkpoint"):
        open_run_to_resume(True, tmp_path)
    assert open_run_to_resume(False, tmp_path) is None


@pytest.mark.parametrize(
    ("recipe", "number", "exit_code"),
    [
        ("lora_single_device", signal.SIGINT, 130),
        ("lora_single_device", signal.SIGTERM, 143),
        slow("full_single_device", signal.SIGTERM, 143),
        slow("lora_dpo_single_device", signal.SIGINT, 130),
    ],
)
def test_L30_a_signal_saves_and_the_run_goes_on_from_there(run_of, tmp_path, recipe, number, exit_code):
    # Only the signal saves.
    run = [*run_of(recipe)[0], f"output_dir={tmp_path / 'out'}", "epochs=600", "save_every_n_steps=10000"]
    process = ForkedTune("run", f"recipes/{recipe}.py", *run)
    while process.poll() is None and num_records(tmp_path / "out") < 2:
        time.sleep(0.01)
    process.send_signal(number)
    result = process.result(timeout_seconds=60)
    assert result.returncode == exit_code, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    num_done = num_records(tmp_path / "out")
    assert num_done < 600
    assert open_run_to_resume(True, tmp_path / "out").path.name == f"step_{num_done:06}"


def test_L30_a_full_disk_destroys_no_checkpoint(short_run, monkeypatch):
    _, output_dir = short_run
    model = with_random_adapters(loaded_model(output_dir.parent / "base", lora_rank=16, lora_alpha=32))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    no_scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainingState(optimizer, no_scaler, "", progress=Progress(num_steps=9))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(path.name for path in (output_dir / "checkpoints").iterdir())
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="the disk of .*step_000009' is full; free space there"):
        save_run_checkpoint(output_dir, AdapterWeights(model, "base", {}), state, "", num_kept=2)
    assert sorted(path.name for path in (output_dir / "checkpoints").iterdir()) == before
    assert open_run_to_resume(True, output_dir).path.name == "step_000006"


def test_two_runs_in_one_directory(make_checkpoint, many_rows, tmp_path):
    run = arguments(make_checkpoint(), many_rows, tmp_path / "out", "epochs=50")
    process = ForkedTune(*TRAINING, *run)
    while process.poll() is None and num_records(tmp_path / "out") < 1:
        time.sleep(0.01)
    result = tune_run(*run, "overwrite_output_dir=true")
    assert result.returncode == 2 and "another run is writing" in result.stderr
    process.send_signal(signal.SIGKILL)
    process.result()
    # The lock of a dead process holds nobody.
    assert tune_run(*run, "overwrite_output_dir=true", "epochs=1").returncode == 0


def test_early_stopping(make_checkpoint, many_rows, tmp_path):
    run = arguments(make_checkpoint(), many_rows, tmp_path / "out", "epochs=30", "max_steps_per_epoch=1")
    result = tune_run(*run, "optimizer.lr=3.0", "clip_grad_norm=null", "val_fraction=0.2", "early_stopping_patience=2")
    assert result.returncode == 0, result.stderr
    validations = [record["val_loss"] for record in outcome(tmp_path / "out")[0] if "val_loss" in record]
    best = validations.index(min(validations))
    assert len(validations) == best + 3 < 30


def test_L12_the_base_is_proven_unchanged(make_checkpoint, many_rows, tmp_path):
    run = arguments(make_checkpoint(), many_rows, tmp_path / "out", "verify_base=true", "max_steps_per_epoch=2")
    assert tune_run(*run).returncode == 0
