"""L35: one unchanged command, repeated until it exits 0, ends with the bytes of a run that was never stopped."""

import random
import shlex
import signal
import time

import pytest

from custom_components.runs.resuming import open_run_to_resume
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.card import TrainedSteps, stated_steps
from tests.support.forked_tune import ForkedTune
from tests.support.recipe_runs import arguments, tune_run
from tests.support.rows import random_dialogs, write_dialogs
from tests.support.run_results import assert_equal, outcome

TRAINING = ("run", "recipes/lora_single_device.py")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
RUN = [
    *("epochs=3", "lora_dropout=0.2", "packed=true", "max_seq_len=64", "batch_size=1", "gradient_accumulation_steps=2"),
    *("save_every_n_steps=4", "val_fraction=0.2", "run_val_every_n_steps=3", "resume_from_checkpoint=auto"),
]


@pytest.fixture
def run_in(make_checkpoint, tmp_path):
    """The command of a run by the directory that it writes."""
    checkpoint = make_checkpoint()
    write_dialogs(tmp_path / "rows.jsonl", random_dialogs(24))
    return lambda name, *overrides: arguments(checkpoint, tmp_path / "rows.jsonl", tmp_path / name, *RUN, *overrides)


def num_records(output_dir):
    metrics = output_dir / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def stopped(command, output_dir, number, num_steps=2):
    """The result of a command that a signal reaches after so many steps."""
    process = ForkedTune(*TRAINING, *command)
    while process.poll() is None and num_records(output_dir) < num_steps:
        time.sleep(0.005)
    process.send_signal(number)
    return process.result(timeout_seconds=120)


def is_saving(output_dir):
    """Whether a checkpoint is written at this moment."""
    return any(output_dir.glob("checkpoints/.step_*.writing-*"))


def wait_until(process, has_come):
    """Wait until something has come, looking all the time; False: the process ended before."""
    while process.poll() is None:
        if has_come():
            return True
        time.sleep(0.0002)
    return False


def stop_at(process, output_dir, moment, number, seconds):
    """Send a signal at a moment: some time after the start, or after a step, or while a checkpoint is written."""
    if moment == "any":
        time.sleep(seconds)
    elif moment == "step":
        before = num_records(output_dir)
        wait_until(process, lambda: num_records(output_dir) > before)
        time.sleep(seconds / 20)
    else:
        # What an earlier kill left is swept away before the first save.
        wait_until(process, lambda: not is_saving(output_dir))
        while wait_until(process, lambda: is_saving(output_dir)):
            process.send_signal(signal.SIGSTOP)
            if is_saving(output_dir):
                break
            process.send_signal(signal.SIGCONT)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("num_stops", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_L35_one_command_stopped_by_anything_ends_as_if_never_stopped(run_in, tmp_path, num_stops):
    """A chain of processes, each ended by a signal: random ones at random moments, in the middle of a save too."""
    long_enough = ("epochs=1000", f"max_steps={8 * num_stops}")
    assert tune_run(*run_in("whole", *long_enough)).returncode == 0
    generator = random.Random(num_stops)
    output_dir, command = tmp_path / "stopped", run_in("stopped", *long_enough)
    kinds = list(zip(["save", "step", "any"] * num_stops, [signal.SIGKILL, *STOP_SIGNALS] * num_stops, strict=False))
    kinds = generator.sample(kinds[:num_stops], num_stops)
    num_torn_saves = 0
    for moment, number in kinds:
        process = ForkedTune(*TRAINING, *command)
        stop_at(process, output_dir, moment, number, generator.uniform(0, 2))
        result = process.result(timeout_seconds=120)
        # Before the recipe begins, a signal does what it always does.
        by_default = {-number} if number == signal.SIGKILL or moment == "any" else set()
        assert result.returncode in {128 + number, *by_default}, (moment, result)
        assert "Traceback" not in result.stderr
        num_torn_saves += is_saving(output_dir)
    assert num_torn_saves >= 1
    result = tune_run(*command)
    assert result.returncode == 0, result.stderr
    assert "going on from" in result.stdout
    assert not is_saving(output_dir)  # nor is anything left of a torn save
    assert_equal(outcome(tmp_path / "whole"), outcome(output_dir))


def test_L35_auto_on_a_finished_run_says_so(run_in, tmp_path):
    assert tune_run(*run_in("out")).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    result = tune_run(*run_in("out"))
    assert result.returncode == 0 and "the run is finished" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    extended = tune_run(*run_in("out", "epochs=4"))
    assert extended.returncode == 0 and "going on from" in extended.stdout


def test_L35_auto_begins_again_where_a_run_died_before_its_first_checkpoint(run_in, tmp_path):
    command = run_in("out", "save_every_n_steps=1000", "epochs=100")
    killed = stopped(command, tmp_path / "out", signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL and num_records(tmp_path / "out") >= 2
    assert tune_run(*run_in("out")).returncode == 0
    assert tune_run(*run_in("whole")).returncode == 0
    assert_equal(outcome(tmp_path / "whole"), outcome(tmp_path / "out"))


def test_auto_does_not_begin_over_the_result_of_another_run(run_in, tmp_path):
    assert tune_run(*run_in("out")).returncode == 0
    other = tune_run(*run_in("out", "lora_rank=4"))
    assert other.returncode == 2 and "lora_rank was" in other.stderr


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_L30_a_stopped_run_leaves_its_adapter_and_the_command_to_go_on(run_in, tmp_path, capsys, number):
    output_dir = tmp_path / "out"
    result = stopped(run_in("out", "epochs=100", "save_every_n_steps=1000"), output_dir, number)
    assert result.returncode == 128 + number, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    resumed = open_run_to_resume("auto", output_dir)
    steps = stated_steps(output_dir / "adapter")
    assert steps.num_steps == resumed.progress.num_steps > 0 and not steps.is_finished
    card = (output_dir / "adapter/README.md").read_text()
    assert f"The run was stopped at step {steps.num_steps} of {steps.num_planned_steps}." in card
    assert (output_dir / "loss.png").exists()
    open_adapter(output_dir / "adapter")
    assert capsys.readouterr().out.count(f"was stopped at step {steps.num_steps} of") == 1
    for words in (f"stopped at step {steps.num_steps} of", str(resumed.path), str(output_dir / "adapter")):
        assert words in result.stdout
    # The command that it prints goes on, and the finished run's adapter takes the place of the stopped one's.
    command = shlex.split(result.stdout.strip().splitlines()[-1])
    assert command[:2] == ["tune", "run"] and command[-1] == "resume_from_checkpoint=true"
    finished = ForkedTune(*command[1:], "epochs=3").result()
    assert finished.returncode == 0, finished.stderr
    assert stated_steps(output_dir / "adapter") == TrainedSteps(
        finished_steps(output_dir), finished_steps(output_dir), True
    )


def finished_steps(output_dir):
    return open_run_to_resume(True, output_dir).progress.num_steps


def test_saves_by_the_clock_change_nothing_but_which_files_there_are(run_in, tmp_path):
    quiet, clocked = run_in("quiet", "save_every_minutes=null"), run_in("clocked", "save_every_minutes=0.000001")
    often = ("save_every_n_steps=1000", "keep_last_n_checkpoints=100")
    for command in (quiet, clocked):
        assert tune_run(*command, *often).returncode == 0
    assert_equal(outcome(tmp_path / "quiet"), outcome(tmp_path / "clocked"))
    saved = {name: len(list((tmp_path / name / "checkpoints").iterdir())) for name in ("quiet", "clocked")}
    assert saved["quiet"] == 1 and saved["clocked"] == finished_steps(tmp_path / "clocked") > 5


def test_an_ignored_hangup_stays_ignored():
    """As under nohup."""
    from custom_components.runtime.stopping import stop_requests

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_asked
            signal.raise_signal(signal.SIGUSR1)
            assert stop.signal_number == signal.SIGUSR1
    finally:
        signal.signal(signal.SIGHUP, before)
