"""One training run by this package, torchtune's built-in recipe and TRL + PEFT + bitsandbytes, side by side.

With --kind dpo DPO beside TRL's DPOTrainer, with --kind full the training of all weights beside transformers' Trainer.

    python -m venv .venv-trl && .venv-trl/bin/pip install -r benchmarks/requirements-trl.txt
    python -m benchmarks.make_checkpoint --shape TINYLLAMA_1B --tokenizer tokenizer.model --output-dir random-1b
    python -m benchmarks.side_by_side --checkpoint-dir random-1b --source alpaca.json --trl-python .venv-trl/bin/python

All get the same base, token ids, labels, adapter to start from (rank 8, alpha 16, all linear layers), order of rows
and constant rate, with NF4, double quantization, bf16 products, AdamW and clipping, each in a process of its own, in
turn, on the CPU. So their first losses have to agree within the rounding of bf16, which is checked.

Pairs are made of the source's answers, joined so that both dialogs of each are of --max-seq-len tokens; TRL computes
the reference's log-probabilities before training, as ours does. All weights are trained in bf16 by torch's fused AdamW,
without 4-bit weights. The ceiling is that of fine-tuning an adapter and is not timed for these.

What still differs: torchtune's recipe refuses adapters of another dtype than the model's, so there they and Adam's
moments are bf16, elsewhere fp32. TRL brings a 4-bit model's adapters to bf16 as well, and is given back fp32 ones.
torchtune and TRL pad the rows of a forward to the longest. torchtune projects every position on the vocabulary.

Seconds per step are the median over the steps after the first two (of three or fewer: after the first). The ceiling is
that of matmul_floor.py for the same steps, timed right before each run. Tokens are those without padding. Memory is
the process's own, nothing subtracted: anonymous until the last step ended, and all that was ever resident, which
includes the mapped checkpoint files. The first step is counted from the start of the process. CPU seconds are those of
all threads: on a machine that others use they say more than the clock.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import side_by_side_ours
from benchmarks.matmul_floor import linear_sizes
from benchmarks.rows import (
    ForwardSize,
    forward_sizes,
    tokenized_pairs,
    tokenized_rows,
    write_adapter,
    write_pairs,
)
from benchmarks.side_by_side_results import (
    COLUMNS,
    OURS,
    Result,
    comparisons,
    first_loss_difference,
    measured,
    table_row,
    timed,
)
from benchmarks.step_log import read_step_log
from benchmarks.tool_process import run_tool
from benchmarks.training_job import TrainingJob
from custom_components.models.shapes import LlamaShape, shape_from_checkpoint
from custom_components.runtime.errors import run_recipe

TRANSFORMERS = "transformers"
# Of a weight in NF4 with double quantization: its code, and its share of a scaler in 8 bits and of a factor in 32.
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
# What each kind of run can be compared with.
TOOLS = {"lora": (OURS, "torchtune", "trl"), "dpo": (OURS, "trl"), "full": (OURS, TRANSFORMERS)}


def main() -> None:
    arguments = parsed_arguments(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="side-by-side-") as folder_name:
        results = run_all(arguments, Path(folder_name))
    base_gib = base_bytes(shape_from_checkpoint(arguments.checkpoint_dir), arguments.kind) / 2**30
    print("", *comparisons(results, base_gib), sep="\n")
    difference, tolerance = first_loss_difference(results)
    print(f"largest difference of first losses: {difference:.4f}; the rounding of bf16: {tolerance:.4f}")
    if difference > tolerance:
        sys.exit("error: the first losses differ by more than rounding: the tools did not train the same")


def run_all(arguments: argparse.Namespace, folder: Path) -> list[Result]:
    """Every tool in every configuration, each a row that is printed as soon as it is there."""
    checkpoint_dir = arguments.checkpoint_dir
    max_seq_len = arguments.max_seq_len or shape_from_checkpoint(checkpoint_dir).max_seq_len
    source = str(arguments.source)
    if arguments.kind == "dpo":
        source = str(write_pairs(checkpoint_dir, source, arguments.num_rows, folder / "pairs.jsonl"))
    read = tokenized_pairs if arguments.kind == "dpo" else tokenized_rows
    rows = read(checkpoint_dir, source, arguments.num_rows, max_seq_len)
    for batch_size, num_forwards in arguments.layouts:
        if len(rows) < batch_size * num_forwards * arguments.num_steps:
            sys.exit(
                f"error: --num-rows: {len(rows)} rows are too few for {arguments.num_steps} steps of "
                f"{batch_size} x {num_forwards}; give more rows or a smaller --num-steps"
            )
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    torchtune_adapter_path = write_adapter(checkpoint_dir, folder / "start")

    [sizes] = zip(*forward_sizes(rows, len(rows), 1), strict=True)
    print(f"{len(rows)} {'pairs' if arguments.kind == 'dpo' else 'rows'} of {sizes[0].num_tokens} tokens\n")
    print(table_row(COLUMNS), table_row(["---"] * len(COLUMNS)), sep="\n", flush=True)
    results = []
    for checkpointing in arguments.checkpointing:
        for batch_size, num_forwards in arguments.layouts:
            for tool in arguments.tools:
                work_dir = folder / f"{tool}-{batch_size}x{num_forwards}-{checkpointing}"
                work_dir.mkdir()
                job = TrainingJob(
                    kind=arguments.kind,
                    checkpoint_dir=str(checkpoint_dir),
                    source=source,
                    num_rows=arguments.num_rows,
                    max_seq_len=max_seq_len,
                    rows_path=str(folder / "rows.json"),
                    adapter_dir=str(folder / "start"),
                    torchtune_adapter_path=str(torchtune_adapter_path),
                    batch_size=batch_size,
                    gradient_accumulation_steps=num_forwards,
                    num_steps=arguments.num_steps,
                    checkpointing=checkpointing,
                    work_dir=str(work_dir),
                )
                steps = forward_sizes(rows, batch_size, num_forwards)[: arguments.num_steps]
                ceiling_seconds = timed_ceiling(job, timed(steps)) if arguments.kind == "lora" else None
                process = run_tool(command(tool, job, arguments.trl_python), work_dir / "log.txt")
                ends = read_step_log(job.step_log_path)
                results.append(measured(tool, job, process, ends, steps, ceiling_seconds))
                print(table_row(results[-1].cells()), flush=True)
    return results


def base_bytes(shape: LlamaShape, kind: str) -> float:
    """What the weights take that are trained on: in bf16, or with all linear layers of the decoder in NF4."""
    num_others = (1 if shape.tied_embeddings else 2) * shape.vocab_size * shape.embed_dim
    num_linear = shape.num_layers * sum(out_dim * in_dim for out_dim, in_dim in linear_sizes(shape))
    return 2 * num_others + num_linear * (2 if kind == "full" else NF4_BITS / 8)


def timed_ceiling(job: TrainingJob, steps: Sequence[Sequence[ForwardSize]]) -> float:
    """The median over the steps, measured in a process of its own."""
    words = [",".join(f"{num_tokens}:{num_supervised}" for num_tokens, num_supervised in step) for step in steps]
    floor_command = [sys.executable, "-m", "benchmarks.matmul_floor", "--checkpoint-dir", job.checkpoint_dir, "--json"]
    floor_command += ["--checkpointing"] if job.checkpointing else []
    floor_command += [word for step in words for word in ("--step", step)]
    process = run_tool(floor_command, Path(job.work_dir) / "floor.txt")
    floors = json.loads(process.output)
    return statistics.median(floor["matmul_seconds"] + floor["dequantize_seconds"] for floor in floors)


def command(tool: str, job: TrainingJob, trl_python: Path | None) -> list[str]:
    if tool == OURS:
        return side_by_side_ours.command(job)
    if tool in ("trl", TRANSFORMERS):
        return [str(trl_python), "-m", "benchmarks.side_by_side_trl", str(job.write())]
    from benchmarks import side_by_side_torchtune  # torchtune's builders take seconds to import

    return side_by_side_torchtune.command(job)


def parsed_arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.side_by_side",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kind", choices=TOOLS, default="lora", help="of training; default: lora")
    parser.add_argument("--checkpoint-dir", type=Path, required=True, help="Hugging Face's format, safetensors")
    parser.add_argument("--source", type=Path, required=True, help="a data file in any format this package reads")
    parser.add_argument("--num-rows", type=int, default=24, help="the first of the source; default: 24")
    parser.add_argument("--max-seq-len", type=int, help="tokens a row is cut to; default: the model's context")
    parser.add_argument("--num-steps", type=int, default=6, help="optimizer steps of each run; default: 6")
    parser.add_argument(
        "--layouts", type=layouts, default="2x2,4x1", help="rows per forward x forwards per step; default: 2x2,4x1"
    )
    parser.add_argument(
        "--checkpointing", type=switches, default="on,off", help="activation checkpointing; default: on,off"
    )
    parser.add_argument(
        "--tools", type=lambda text: text.split(","), help="default: ours, and all of the kind's others"
    )
    parser.add_argument("--trl-python", type=Path, help="python of an environment with requirements-trl.txt")
    arguments = parser.parse_args(words)
    known = TOOLS[arguments.kind]
    arguments.tools = arguments.tools or list(known)
    if not set(arguments.tools) <= set(known):
        parser.error(f"argument --tools: {','.join(arguments.tools)!r} is not a list of {', '.join(known)}")
    for name in ("checkpoint_dir", "source"):
        if not getattr(arguments, name).exists():
            parser.error(f"--{name.replace('_', '-')}: there is no {str(getattr(arguments, name))!r}")
    if {"trl", TRANSFORMERS} & set(arguments.tools) and not (arguments.trl_python and arguments.trl_python.exists()):
        parser.error("--trl-python: name the python that trl is installed for, or --tools without it")
    for name in ("checkpoint_dir", "source", "trl_python"):
        if getattr(arguments, name):
            # note: absolute, because tools run elsewhere; not resolved, a virtual environment's python is a link.
            setattr(arguments, name, getattr(arguments, name).absolute())
    return arguments


def layouts(text: str) -> list[tuple[int, int]]:
    """`2x2,4x1` as [(2, 2), (4, 1)]."""
    pairs = [layout.split("x") for layout in text.split(",")]
    if not all(len(pair) == 2 and all(number.isdecimal() and int(number) for number in pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 2x2,4x1")
    return [(int(batch_size), int(num_forwards)) for batch_size, num_forwards in pairs]


def switches(text: str) -> list[bool]:
    words = text.split(",")
    if not set(words) <= {"on", "off"}:
        raise argparse.ArgumentTypeError(f"{text!r} is none of on, off and on,off")
    return [word == "on" for word in words]


if __name__ == "__main__":
    run_recipe(main)
