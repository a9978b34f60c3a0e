"""The benchmarks' own arithmetic and command lines; nothing is timed here."""

import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks import generate, layer_parts, matmul_floor, side_by_side, side_by_side_ours, side_by_side_results
from benchmarks.rows import ForwardSize, forward_sizes, tokenized_pairs, write_adapter, write_pairs
from benchmarks.side_by_side_results import Result
from benchmarks.step_log import StepEnd, StepLog, read_step_log
from benchmarks.tool_process import ToolProcess, run_tool
from benchmarks.training_job import LORA_ALPHA, LORA_RANK, TrainingJob
from custom_components.config.full_settings import FullSettings
from custom_components.config.lora_settings import LoRASettings
from custom_components.config.preference_settings import PreferenceSettings
from custom_components.config.reading import load_settings
from custom_components.models.builders import lora_llama_from_config
from custom_components.models.shapes import LlamaShape
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.adapters import check_adapter_fits
from tests.support.models import ALL_ATTENTION
from tests.support.paths import PROJECT

SHAPE = LlamaShape(64, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=64, intermediate_dim=128, max_seq_len=32)


def row(num_tokens, num_masked):
    return {"tokens": [5] * num_tokens, "labels": [-100] * num_masked + [5] * (num_tokens - num_masked)}


def job(tmp_path, **changes):
    values = dict.fromkeys(("checkpoint_dir", "source", "rows_path", "adapter_dir", "torchtune_adapter_path"), "x")
    values |= {"num_rows": 8, "max_seq_len": 64, "batch_size": 2, "gradient_accumulation_steps": 2, "num_steps": 4}
    return TrainingJob(**(values | {"kind": "lora", "checkpointing": False, "work_dir": str(tmp_path)} | changes))


def result(tool, step_seconds, checkpointing=False, losses=(10.0,)):
    figures = dict.fromkeys(
        ("tokens_per_second", "supervised_tokens_per_second", "peak_resident_gib", "first_step_seconds", "run_seconds"),
        1.0,
    )
    return Result(
        tool=tool, batch_size=2, gradient_accumulation_steps=2, checkpointing=checkpointing, step_seconds=step_seconds,
        step_processor_seconds=step_seconds**2, ceiling_seconds=1.0, peak_anonymous_gib=step_seconds,
        losses=list(losses), **figures,
    )  # fmt: skip


def test_forward_sizes_count_what_is_trained_on_and_leave_a_partial_step_out():
    # A first token that is not masked is not predicted either.
    rows = [row(3, 1), row(4, 0), row(5, 5), row(6, 2), row(9, 1)]
    assert forward_sizes(rows, 2, 2) == [[ForwardSize(7, 5), ForwardSize(11, 4)]]
    assert forward_sizes(rows, 4, 1) == [[ForwardSize(18, 9)]]
    assert forward_sizes(rows[:3], 4, 1) == []


def test_a_runs_figures_are_those_of_its_timed_steps(tmp_path):
    ends = [StepEnd(loss, moment) for loss, moment in ((11.0, 110.0), (10.0, 120.0), (9.0, 122.0), (8.0, 126.0))]
    steps = [[ForwardSize(1000, 1000)]] * 2 + [[ForwardSize(6, 2)], [ForwardSize(12, 4)]]
    processor_samples = [(100.0, 0.0), (110.1, 12.0), (119.9, 13.0), (122.2, 16.0), (125.9, 23.0)]
    anonymous_samples = [(101.0, 2**30), (125.0, 2**31), (149.0, 2**32)]
    process = ToolProcess(100.0, 50.0, anonymous_samples, processor_samples, 2**33, "")
    figures = side_by_side_results.measured("ours", job(tmp_path), process, ends, steps, ceiling_seconds=1.5)
    assert (figures.step_seconds, figures.first_step_seconds, figures.run_seconds) == (3.0, 10.0, 50.0)
    assert figures.step_processor_seconds == 5.0
    assert (figures.tokens_per_second, figures.supervised_tokens_per_second) == (3.0, 1.0)
    assert (figures.peak_anonymous_gib, figures.peak_resident_gib) == (2.0, 8.0)
    assert len(figures.cells()) == len(side_by_side_results.COLUMNS)
    assert figures.cells()[6] == "2.00"
    assert len(replace(figures, ceiling_seconds=None).cells()) == len(side_by_side_results.COLUMNS)


def test_comparisons_take_each_tools_fastest_run():
    lines = list(
        side_by_side_results.comparisons(
            [
                result("ours", 3.0, True),
                result("ours", 2.0),
                result("trl", 5.0),
                result("trl", 4.0),
                result("trl", 9.0, True),
            ],
            base_gib=1.0,
        )
    )
    assert ["3.00 times" in lines[0], "2.00 times" in lines[1], "2.00 times" in lines[2]] == [True] * 3
    assert "ours (2 x 2, checkpointing off)" in lines[2] and len(lines) == 3
    assert "4.00 times in CPU seconds, with 0.50 times its memory, 0.33 times above the 1.00 GiB" in lines[2]


def test_first_losses_are_held_against_each_other():
    difference, tolerance = side_by_side_results.first_loss_difference(
        [result("ours", 1.0, losses=(10.0, 1.0)), result("trl", 1.0, losses=(10.01, 2.0))]
    )
    assert difference == pytest.approx(0.01) and difference < tolerance < 0.05


def test_step_log_is_read_back(tmp_path):
    log = StepLog(str(tmp_path / "steps.jsonl"))
    log.log_dict({"loss": 2.5, "lr": 1.0}, step=1)
    log.log_dict({"loss": 2.0}, step=2)
    first, second = read_step_log(tmp_path / "steps.jsonl")
    assert (first.loss, second.loss) == (2.5, 2.0) and first.ended_at_seconds <= second.ended_at_seconds


def test_jobs_are_read_back(tmp_path):
    written = job(tmp_path)
    assert TrainingJob.read(written.write()) == written


def test_the_adapter_to_start_from_fits_and_is_the_same_in_both_formats(make_checkpoint, tmp_path):
    from safetensors.torch import load_file

    checkpoint = make_checkpoint()
    torchtune_path = write_adapter(checkpoint, tmp_path / "start")
    model = lora_llama_from_config(checkpoint, ALL_ATTENTION, True, lora_rank=LORA_RANK, lora_alpha=LORA_ALPHA)
    check_adapter_fits(model, open_adapter(tmp_path / "start"))
    missing, unexpected = model.load_state_dict(load_file(torchtune_path), strict=False)
    assert not unexpected and not [name for name in missing if "lora" in name]
    assert all(module.weight.any() for name, module in model.named_modules() if name.endswith("lora_a"))
    assert not any(module.weight.any() for name, module in model.named_modules() if name.endswith("lora_b"))


@pytest.mark.parametrize(
    ("kind", "settings_type"), [("lora", LoRASettings), ("dpo", PreferenceSettings), ("full", FullSettings)]
)
def test_our_command_is_a_config_that_the_recipe_takes(tmp_path, monkeypatch, kind, settings_type):
    monkeypatch.chdir(PROJECT)
    words = side_by_side_ours.command(job(tmp_path, kind=kind, checkpointing=True))
    settings = load_settings(settings_type, words[words.index("--config") :])
    assert not isinstance(settings, PreferenceSettings) or settings.preference_loss == "sigmoid"  # as TRL's
    assert (settings.batch_size, settings.gradient_accumulation_steps, settings.max_steps_per_epoch) == (2, 2, 4)
    assert settings.enable_activation_checkpointing is True and settings.dataset["max_rows"] == 8


def test_pairs_have_the_length_that_is_asked_for(make_checkpoint, many_rows, tmp_path):
    """Both dialogs of each, so that a step has the same tokens whichever tool takes it."""
    checkpoint = make_checkpoint()
    path = write_pairs(checkpoint, str(many_rows), 3, tmp_path / "pairs.jsonl")
    pairs = tokenized_pairs(checkpoint, str(path), 3, max_seq_len=24)
    assert [[len(pair[name]["tokens"]) for name in ("chosen", "rejected")] for pair in pairs] == [[24, 24]] * 3
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    assert forward_sizes(pairs, 1, 1)[0][0].num_tokens == 48


def test_weights_take_what_their_format_does():
    # 2 x (64 x 64 + 2 x 32 x 64 + 64 x 64 + 3 x 64 x 128) linear weights, and two matrices of 64 x 64.
    assert side_by_side.base_bytes(SHAPE, "full") == 2 * (2 * 36_864 + 2 * 4_096)
    assert side_by_side.base_bytes(SHAPE, "dpo") == 2 * 2 * 4_096 + 2 * 36_864 * (4 + 65 / 512) / 8


def test_floors_of_every_forward_are_summed():
    steps = [[(8, 4)], [(8, 4), (8, 4)]]
    one, two = matmul_floor.step_floors(SHAPE, steps, checkpointing=False)
    [recomputed] = matmul_floor.step_floors(SHAPE, steps[:1], checkpointing=True)
    assert two.dequantize_seconds == 2 * one.dequantize_seconds
    assert min(one.matmul_seconds, two.matmul_seconds, recomputed.matmul_seconds, recomputed.dequantize_seconds) > 0
    assert sum(out_dim * in_dim for out_dim, in_dim in matmul_floor.linear_sizes(SHAPE)) == 64 * (3 * 64 + 3 * 128)


def test_a_recomputed_layer_s_floor_leaves_out_its_last_product(monkeypatch):
    monkeypatch.setattr(matmul_floor, "median_seconds", lambda function: len(function()))
    [plain] = matmul_floor.step_floors(SHAPE, [[(8, 4)]], checkpointing=False)
    [recomputed] = matmul_floor.step_floors(SHAPE, [[(8, 4)]], checkpointing=True)
    num_linears_of_layer = 7
    num_more = SHAPE.num_layers * (num_linears_of_layer - 1)
    assert recomputed.matmul_seconds - plain.matmul_seconds == num_more
    assert recomputed.dequantize_seconds - plain.dequantize_seconds == num_more


def test_step_sizes_are_read():
    assert matmul_floor.step_sizes("302:217,262:180") == [(302, 217), (262, 180)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layouts", "4"], "not of the form"),
        (["--layouts", "0x1"], "not of the form"),
        (["--checkpointing", "yes"], "none of on, off"),
        (["--tools", "unsloth"], "not a list of ours, torchtune, trl"),
        (["--kind", "dpo", "--tools", "torchtune"], "not a list of ours, trl"),
        (["--source", "nowhere.json"], "--source: there is no 'nowhere.json'"),
        (["--tools", "trl"], "--trl-python: name the python"),
    ],
)
def test_bad_arguments_are_named(words, message, capsys):
    whole = ["--checkpoint-dir", ".", "--source", "pyproject.toml", "--tools", "ours", *words]
    with pytest.raises(SystemExit) as stopped:
        side_by_side.parsed_arguments(whole)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_arguments_have_defaults():
    arguments = side_by_side.parsed_arguments(
        ["--checkpoint-dir", ".", "--source", "pyproject.toml", "--trl-python", sys.executable]
    )
    assert arguments.layouts == [(2, 2), (4, 1)] and arguments.checkpointing == [True, False]
    assert arguments.tools == ["ours", "torchtune", "trl"]


def test_tools_are_run_and_their_failures_shown(tmp_path):
    process = run_tool([sys.executable, "-c", "print('x' * 100_000)"], tmp_path / "log.txt")
    assert len(process.output) == 100_001 and 0 < process.peak_anonymous_bytes() <= process.peak_resident_bytes
    with pytest.raises(SystemExit, match=r"exit code 3[\s\S]*no memory left"):
        run_tool(
            [sys.executable, "-c", "import sys; print('no memory left', file=sys.stderr); sys.exit(3)"],
            tmp_path / "log.txt",
        )


def test_workers_of_the_other_environment_need_nothing_of_this_one():
    modules = "benchmarks.training_job, benchmarks.step_log, benchmarks.generation_job"
    subprocess.run([sys.executable, "-S", "-c", f"import {modules}"], cwd=PROJECT, check=True)


def test_leading_tokens_that_agree_are_counted():
    assert generate.num_leading_equal([1, 2, 3], [1, 2, 4]) == 2
    assert generate.num_leading_equal([1, 2], [1, 2]) == 2
    assert generate.num_leading_equal([1], [2]) == 0


@pytest.mark.parametrize("part", ["attention", "rotary_positions", "norm", "quantized_product"])
def test_every_way_to_compute_a_part_of_a_layer_is_timed(monkeypatch, part):
    monkeypatch.setattr(layer_parts, "NUM_REPEATS", 1)
    milliseconds = getattr(layer_parts, part)(SHAPE, [5, 3])
    assert "ours" in milliseconds and len(milliseconds) > 1
    assert all(value > 0 for value in milliseconds.values())
