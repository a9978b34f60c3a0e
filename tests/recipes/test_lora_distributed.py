"""Training on several ranks: what it leaves is what one process leaves that computes all forwards."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import write_checkpoint
from tests.support.paths import PROJECT
from tests.support.ranks import ForkedRanks, free_port, launched_tune
from tests.support.recipe_runs import arguments, tune_run
from tests.support.rows import random_dialogs, write_dialogs
from tests.support.run_results import assert_equal, outcome, records

# Dropout, noise, validation, another rate for B, a last window with fewer forwards than ranks.
RUN = [
    *("epochs=1", "dtype=fp32", "lora_dropout=0.1", "neftune_noise_alpha=5", "batch_size=2", "save_every_n_steps=1"),
    "keep_last_n_checkpoints=3",
    *("val_fraction=0.2", "run_val_every_n_steps=1", "lora_plus_ratio=4", "verify_base=true"),
]
PER_DEVICE = "tokens_per_second_per_device"


def run_of(folder, name, *overrides, checkpoint="checkpoint"):
    return arguments(folder / checkpoint, folder / "rows.jsonl", folder / name, *RUN, *overrides)


def forwards(num):
    return f"gradient_accumulation_steps={num}"


def assert_same_run(folder, other, tolerance=1e-5):
    """Losses, validations and adapters are the same but for the order of fp32 sums."""
    runs = []
    for output_dir in (folder, other):
        metrics, weights, checkpoint, state = outcome(output_dir)
        runs.append((metrics, weights, checkpoint, state["progress"]["num_tokens"], state["best_adapter"]))
    (metrics, weights, *rest), (other_metrics, other_weights, *other_rest) = runs
    for record, other_record in zip(metrics, other_metrics, strict=True):
        record.pop(PER_DEVICE, None), other_record.pop(PER_DEVICE, None)
        assert record == pytest.approx(other_record, rel=tolerance, abs=tolerance)
    torch.testing.assert_close(weights, other_weights, rtol=0, atol=tolerance)
    assert rest[:2] == other_rest[:2]
    torch.testing.assert_close(rest[2], other_rest[2], rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, rows, and a run in one process with four forwards a step: 9 forwards, 3 steps."""
    folder = tmp_path_factory.mktemp("runs")
    write_checkpoint(folder / "checkpoint")
    write_dialogs(folder / "rows.jsonl", random_dialogs(22))
    result = tune_run(*run_of(folder, "one", forwards(4)))
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """The same on two ranks with two forwards each."""
    ranks = ForkedRanks(2, *run_of(folder, "two", forwards(2), "parallelism=replicate")).results()
    assert [rank.returncode for rank in ranks] == [0, 0], [rank.stderr for rank in ranks]
    return ranks


def test_two_ranks_leave_what_one_process_leaves(folder, two):
    assert len(records(folder / "one")) == 6
    assert_same_run(folder / "one", folder / "two")
    last = records(folder / "two")[-2]
    assert last[PER_DEVICE] == pytest.approx(last["tokens_per_second"] / 2)
    names = [sorted(path.name for path in (folder / name).iterdir()) for name in ("one", "two")]
    assert names[0] == names[1]
    assert (two[1].stdout, two[1].stderr) == ("", "")
    assert "3 steps" in two[0].stdout and "step 3/3" in two[0].stderr


@pytest.mark.slow  # it waits for five seconds
def test_a_recipe_for_one_process_is_refused_in_several(folder):
    ranks = ForkedRanks(2, *run_of(folder, "refused"), recipe="recipes/lora_single_device.py").results(60)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert ranks[0].stderr.startswith("error: --nproc_per_node: 2 processes") and ranks[0].stderr.count("\n") == 1
    assert ranks[1].stderr == "" and not (folder / "refused").exists()


def test_problems_of_any_rank_are_one_line_of_the_first(folder):
    """Before anything is written, and with the same exit code everywhere."""
    for wrong, words in (
        (["", "lora_rnk=3"], "rank 1: lora_rnk: unknown key"),
        (["", "checkpoint_dir=/nowhere"], "rank 1: checkpoint_dir"),
        (["", "seed=5"], "the config"),
    ):
        ranks = ForkedRanks(2, *run_of(folder, "wrong"), of_rank=[override or forwards(1) for override in wrong])
        first, second = ranks.results(60)
        assert (first.returncode, second.returncode) == (2, 2), (first.stderr, second.stderr)
        assert second.stderr == "" and first.stderr.count("\n") == 1, (first.stderr, second.stderr)
        assert first.stderr.startswith("error: ") and words in first.stderr
    assert not (folder / "wrong").exists()


def test_more_ranks_than_forwards_of_a_step_are_refused(folder):
    ranks = ForkedRanks(2, *run_of(folder, "few"), "batch_size=32", forwards(1)).results(60)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "has 1 forwards; start at most 1" in ranks[0].stderr
    assert "".join(rank.stderr for rank in ranks).count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_L20_a_run_goes_on_with_any_number_of_ranks(folder, two, num_ranks):
    """With as many as before bit for bit; with others to the order of sums, and it says so."""
    at = f"resume_from_checkpoint={folder / 'two/checkpoints/step_000001'}"
    run = run_of(folder, f"on {num_ranks}", forwards(2), at)
    results = [tune_run(*run)] if num_ranks == 1 else ForkedRanks(num_ranks, *run).results()
    assert [result.returncode for result in results] == [0] * num_ranks, [result.stderr for result in results]
    said = f"the run was begun on 2 devices: a step keeps its 4 forwards, now on {num_ranks}"
    assert (said in results[0].stdout) == (num_ranks != 2)
    if num_ranks == 2:
        whole, resumed = outcome(folder / "two"), outcome(folder / "on 2")
        for metrics in (whole[0], resumed[0]):
            for record in metrics:
                record.pop(PER_DEVICE, None)
        assert_equal(whole, resumed)
    else:
        assert_same_run(folder / "one", folder / f"on {num_ranks}")


@pytest.fixture(scope="module")
def long_run(folder):
    """A run that does not end by itself."""
    write_dialogs(folder / "many.jsonl", random_dialogs(400))

    def run(name, *overrides):
        own = (f"dataset.source={folder / 'many.jsonl'}", "epochs=500", "run_val_every_n_steps=null", "~val_fraction")
        return run_of(folder, name, forwards(2), *own, "save_every_n_steps=3", "sample_prompts=[]", *overrides)

    return run


def wait_for_steps(output_dir, num_steps, is_running):
    metrics = output_dir / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < num_steps:
        assert is_running()
        time.sleep(0.05)


def ranks_of(launcher):
    """The processes that a launcher has started, by rank."""
    pids = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
    of_rank = {}
    for pid in pids:
        environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
        ranks = [entry.removeprefix("RANK=") for entry in environment if entry.startswith("RANK=")]
        of_rank |= {int(rank): pid for rank in ranks}
    return of_rank


def started(*arguments, **environment):
    return launched_tune("run", *arguments, **environment)


LAUNCHED = ("--nproc_per_node", "2", "recipes/lora_distributed.py")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run_with_one_line(folder, long_run, rank):
    name = f"killed {rank}"
    launcher = started(*LAUNCHED, *long_run(name))
    wait_for_steps(folder / name, 5, lambda: launcher.poll() is None)
    os.kill(ranks_of(launcher)[rank], signal.SIGKILL)
    _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 128 + signal.SIGKILL
    [line] = [line for line in err.splitlines() if not line.startswith("step ")]
    assert line.startswith(f"error: rank {rank} was ended by SIGKILL in step ")
    newest = max((folder / name / "checkpoints").glob("step_*"))
    assert str(newest) in line or f"step_{int(newest.name[5:]) - 3:06}" in line


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_and_the_run_goes_on_from_there(folder, long_run):
    launcher = started(*LAUNCHED, *long_run("signalled"))
    wait_for_steps(folder / "signalled", 4, lambda: launcher.poll() is None)
    launcher.send_signal(signal.SIGTERM)
    out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in err and all(line.startswith("step ") for line in err.splitlines())
    num_steps = len(records(folder / "signalled"))
    assert f"stopped at step {num_steps} of " in out
    assert "tune run --nproc_per_node 2 recipes/lora_distributed.py " in out
    assert (folder / f"signalled/checkpoints/step_{num_steps:06}/state.pt").exists()


@pytest.mark.slow
def test_the_launcher_ends_as_its_ranks(folder):
    """torchtune would end with 1, and dozens of lines."""
    for recipe, override, words in (
        ("lora_distributed", "lora_rnk=3", "lora_rnk: unknown key"),
        ("lora_single_device", "lora_rank=3", "--nproc_per_node: 2 processes were started"),
    ):
        launcher = started("--nproc_per_node", "2", f"recipes/{recipe}.py", *run_of(folder, "never", override))
        out, err = launcher.communicate(timeout=60)
        assert launcher.returncode == 2, err
        [line] = err.splitlines()
        assert line.startswith("error: ") and words in line


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_without_a_launcher_is_named(folder, long_run, signal_number):
    """As on another machine, whose launcher is another."""
    name = f"lost {signal_number.name}"
    ranks = ForkedRanks(2, *long_run(name, "collective_timeout_seconds=4"))
    wait_for_steps(folder / name, 2, lambda: ranks.processes[0].poll() is None)
    ranks.processes[1].send_signal(signal_number)
    begin_seconds = time.monotonic()
    first = ranks.processes[0].result(60)
    ranks.processes[1].send_signal(signal.SIGKILL)
    assert first.returncode == 2 and time.monotonic() - begin_seconds < 20
    [line] = [line for line in first.stderr.splitlines() if not line.startswith("step ")]
    why = "rank 1 has ended" if signal_number == signal.SIGKILL else "no answer from rank 1 within collective_timeout_s"
    assert line.startswith("error: step ") and why in line


@pytest.mark.slow
def test_sample_prompts_are_answered_while_the_other_ranks_wait(folder):
    overrides = ("sample_prompts=['Who?']", "save_every_minutes=0.001")
    ranks = ForkedRanks(2, *run_of(folder, "samples", forwards(2), *overrides)).results()
    assert [rank.returncode for rank in ranks] == [0, 0], [rank.stderr for rank in ranks]
    assert "before  " in ranks[0].stdout and ranks[1].stdout == ""
    result = tune_run(*run_of(folder, "samples of one", forwards(4), *overrides))
    assert result.returncode == 0, result.stderr
    answers = [(folder / name / "samples.jsonl").read_text() for name in ("samples", "samples of one")]
    assert answers[0] == answers[1] and answers[0].count("\n") == 3


@pytest.mark.slow
def test_two_machines_train_together(folder):
    """Two launchers, which find each other on loopback."""
    endpoint = f"127.0.0.1:{free_port()}"
    options = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint]
    run = [*options, "--rdzv_id", "test", "recipes/lora_distributed.py", *run_of(folder, "two machines", forwards(2))]
    launchers = [started(*run) for _ in range(2)]
    printed = [launcher.communicate(timeout=120) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], printed
    assert_same_run(folder / "one", folder / "two machines")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["embedded", "stories260K"])
@pytest.mark.parametrize(
    "variant",
    [
        *("quantize_base=false", "quantize_base=true", "use_dora=true", "packed=true"),
        "enable_activation_checkpointing=true",
    ],
)
def test_every_variant_leaves_what_one_process_leaves(folder, test_data, model, variant):
    """Of six forwards a step, with 1, 2 and 3 ranks, replicated and sharded."""
    checkpoint = PROJECT / "examples/tiny_llama/checkpoint" if model == "embedded" else test_data("stories260K")
    own = ("quantize_base=true", "max_steps=3", f"checkpoint_dir={checkpoint}", "max_seq_len=128", "verify_base=false")
    own = (*own, variant, "overwrite_output_dir=true", "run_val_every_n_steps=2")
    whole, shared = (f"{model} {variant} {kind}" for kind in ("whole", "shared"))
    result = tune_run(*run_of(folder, whole, *own, forwards(6)))
    assert result.returncode == 0, result.stderr
    for num_ranks in (1, 2, 3):
        for parallelism in ("replicate", "shard"):
            run = run_of(folder, shared, *own, forwards(6 // num_ranks), f"parallelism={parallelism}")
            results = ForkedRanks(num_ranks, *run).results()
            assert [result.returncode for result in results] == [0] * num_ranks, [each.stderr for each in results]
            assert_same_run(folder / whole, folder / shared)


@pytest.mark.slow
def test_L20_a_sharded_run_goes_on_with_any_number_of_ranks(folder, two):
    """Its checkpoints are those of one device."""
    own = ("parallelism=shard", "verify_base=false", "quantize_base=true")
    whole = ForkedRanks(2, *run_of(folder, "sharded", forwards(2), *own)).results()
    assert [result.returncode for result in whole] == [0, 0], whole[0].stderr
    at = f"resume_from_checkpoint={folder / 'sharded/checkpoints/step_000001'}"
    for num_ranks in (2, 3):
        run = run_of(folder, f"sharded on {num_ranks}", forwards(2), at, *own)
        results = ForkedRanks(num_ranks, *run).results()
        assert [result.returncode for result in results] == [0] * num_ranks, [each.stderr for each in results]
        assert_same_run(folder / "sharded", folder / f"sharded on {num_ranks}")
    result = tune_run(*run_of(folder, "sharded on 1", forwards(2), at, "quantize_base=true"))
    assert result.returncode == 0, result.stderr
    assert_same_run(folder / "sharded", folder / "sharded on 1")


@pytest.mark.slow
def test_what_needs_the_whole_base_is_refused_where_it_is_sharded(folder):
    own = ("parallelism=shard", "sample_prompts=['Who?']", "verify_base=true", "quantized_cache=true", "compile=true")
    ranks = ForkedRanks(2, *run_of(folder, "whole base", *own, f"cache_dir={folder / 'cache'}")).results(60)
    assert [rank.returncode for rank in ranks] == [2, 2]
    lines = ranks[0].stderr.splitlines()
    assert [line.split(":")[1] for line in lines] == [" sample_prompts", " verify_base", " quantized_cache", " compile"]
    assert ranks[1].stderr == ""
