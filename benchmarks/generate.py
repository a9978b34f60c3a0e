"""Milliseconds per token of greedy decoding: this package beside transformers + PEFT + bitsandbytes.

    python -m venv .venv-trl && .venv-trl/bin/pip install -r benchmarks/requirements-trl.txt
    python -m benchmarks.make_checkpoint --shape TINYLLAMA_1B --output-dir random-1b
    python -m benchmarks.generate --checkpoint-dir random-1b --trl-python .venv-trl/bin/python

Both answer the same prompts, one at a time, on the CPU, with the same base in NF4 (double quantization, bf16 products)
and the same adapter (rank 8, alpha 16, all linear layers), unmerged; each in a process of its own, in turn. The floor
is that of gemv_floor.py, timed right before each. Milliseconds are the median over all tokens but the first of
each answer; the first waits for the prompt to be read. Memory is the anonymous one of the process, nothing subtracted.
The two quantize and round differently in the last place, so that answers part ways where two tokens are nearly as
likely; on most prompts the first token has to agree, which is checked.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.generation_job import Answer, GenerationJob, parsed_answers
from benchmarks.rows import write_adapter
from benchmarks.side_by_side_results import table_row
from benchmarks.tool_process import ToolProcess, run_tool
from custom_components.models.shapes import shape_from_checkpoint
from custom_components.runtime.errors import run_recipe

# Enough for the adapter to change most answers, as a trained one does.
ADAPTER_B_STD = 0.01
COLUMNS = ("tool", "ms/token", "tokens/s", "floor ms", "ms / floor", "prompt ms", "anonymous GiB")
FIRST_ID_OF_TEXT = 3  # of Llama's vocabulary: those before are <unk>, <s>, </s>


def main() -> None:
    arguments = parsed_arguments(sys.argv[1:])
    vocab_size = shape_from_checkpoint(arguments.checkpoint_dir).vocab_size
    answers, medians_ms = {}, {}
    with tempfile.TemporaryDirectory(prefix="generate-") as folder_name:
        folder = Path(folder_name)
        write_adapter(arguments.checkpoint_dir, folder / "adapter", b_std=ADAPTER_B_STD)
        prompts = random_prompts(arguments.num_prompts, arguments.num_prompt_tokens, vocab_size)
        job = GenerationJob(str(arguments.checkpoint_dir), str(folder / "adapter"), prompts, arguments.num_new_tokens)
        job.write(folder / "job.json")
        print(table_row(COLUMNS), table_row(["---"] * len(COLUMNS)), sep="\n", flush=True)
        for tool, python, module in (
            ("ours", sys.executable, "benchmarks.generate_ours"),
            ("transformers", str(arguments.trl_python), "benchmarks.generate_transformers"),
        ):
            floor_ms = timed_floor_ms(job, folder / "floor.txt")
            process = run_tool([python, "-m", module, str(folder / "job.json")], folder / f"{tool}.txt")
            answers[tool] = parsed_answers(process.output)
            medians_ms[tool] = median_token_ms(answers[tool])
            print(table_row(cells(tool, answers[tool], floor_ms, process)), flush=True)
    print(
        f"\nours has {medians_ms['transformers'] / medians_ms['ours']:.2f} times the tokens per second of transformers"
    )
    agreements = [
        num_leading_equal(ours.tokens, theirs.tokens)
        for ours, theirs in zip(answers["ours"], answers["transformers"], strict=True)
    ]
    print(f"leading tokens that agree, of {arguments.num_new_tokens}: {', '.join(map(str, agreements))}")
    if sum(map(bool, agreements)) * 2 <= len(agreements):
        sys.exit("error: on most prompts not even the first token agrees: the tools did not run the same model")


def parsed_arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint-dir", type=Path, required=True, help="Hugging Face's format, safetensors")
    parser.add_argument("--trl-python", type=Path, required=True, help="of an environment with requirements-trl.txt")
    parser.add_argument("--num-prompts", type=int, default=3, help="default: 3")
    parser.add_argument("--num-prompt-tokens", type=int, default=32, help="of each prompt; default: 32")
    parser.add_argument("--num-new-tokens", type=int, default=64, help="of each answer; default: 64")
    arguments = parser.parse_args(words)
    for name in ("checkpoint_dir", "trl_python"):
        if not getattr(arguments, name).exists():
            parser.error(f"--{name.replace('_', '-')}: there is no {str(getattr(arguments, name))!r}")
        # note: absolute, because tools run elsewhere; not resolved, a virtual environment's python is a link.
        setattr(arguments, name, getattr(arguments, name).absolute())
    return arguments


def random_prompts(num_prompts: int, num_tokens: int, vocab_size: int) -> list[list[int]]:
    """Each begins with Llama's BOS."""
    draw = random.Random(0)
    return [
        [1, *(draw.randrange(FIRST_ID_OF_TEXT, vocab_size) for _ in range(num_tokens - 1))] for _ in range(num_prompts)
    ]


def timed_floor_ms(job: GenerationJob, log_path: Path) -> float:
    floor_command = [sys.executable, "-m", "benchmarks.gemv_floor", "--checkpoint-dir", job.checkpoint_dir, "--json"]
    return sum(json.loads(run_tool(floor_command, log_path).output).values())


def median_token_ms(answers: Sequence[Answer]) -> float:
    return 1000 * statistics.median(seconds for answer in answers for seconds in answer.token_seconds)


def cells(tool: str, answers: Sequence[Answer], floor_ms: float, process: ToolProcess) -> list[str]:
    token_ms = median_token_ms(answers)
    return [
        tool,
        f"{token_ms:.1f}",
        f"{1000 / token_ms:.1f}",
        f"{floor_ms:.1f}",
        f"{token_ms / floor_ms:.2f}",
        f"{1000 * statistics.median(answer.prefill_seconds for answer in answers):.0f}",
        f"{process.peak_anonymous_bytes() / 2**30:.2f}",
    ]


def num_leading_equal(first: Sequence[int], second: Sequence[int]) -> int:
    differences = (index for index, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1])
    return next(differences, len(first))


if __name__ == "__main__":
    run_recipe(main)
