"""`make demo`: train the tiny Llama with the main recipe, then ask it what it was never asked in training."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torchtune.modules.peft import disable_adapter

from custom_components.config.lora_settings import LoRASettings
from custom_components.config.reading import load_settings
from custom_components.datasets.sources import read_rows
from custom_components.generation.decoding import Sampling, answer_messages
from custom_components.runs.metrics import read_metrics
from custom_components.runs.run_directory import RunDirectory
from custom_components.runtime.atomic_files import whole_file
from custom_components.runtime.disk_errors import disk_errors_of
from custom_components.runtime.errors import UserError, run_recipe
from custom_components.runtime.terminal import say
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.weights.adapted_model import load_model_for_inference
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.checkpoint_files import open_checkpoint

CONFIG = "configs/tiny_qlora.yaml"
HELD_OUT = "examples/tiny_llama/data/held_out.jsonl"
NUM_SHOWN = 8


def main() -> None:
    settings = load_settings(LoRASettings, ["--config", CONFIG, *sys.argv[1:]])
    report_path = settings.output_dir / "report.json"
    check_no_other_file(report_path)
    tune = Path(sys.executable).with_name("tune")
    command = [str(tune), "run", "recipes/lora_single_device.py", "--config", CONFIG, *sys.argv[1:]]
    print(f"$ tune {' '.join(command[1:])}", flush=True)
    if returncode := returncode_of(command):
        sys.exit(returncode)

    run_directory = RunDirectory(settings.output_dir)
    dialogs = [row.values["messages"] for row in read_rows(HELD_OUT)]
    questions = [dialog[:-1] for dialog in dialogs]
    right_answers = [dialog[-1]["content"] for dialog in dialogs]

    base, adapter = open_checkpoint(settings.checkpoint_dir), open_adapter(run_directory.result)
    tokenizer = Llama2ChatTransform(base.tokenizer_model)
    model = load_model_for_inference(base, adapter, settings.quantize_base, torch.float32, torch.device("cpu"))

    def answers() -> list[str]:
        return answer_messages(model, tokenizer, questions, max_new_tokens=16, sampling=Sampling())

    with disable_adapter(model):
        base_answers = answers()
    tuned_answers = answers()

    say(f"\nQuestions about places it was never asked about in training, {NUM_SHOWN} of {len(questions)}:")
    for question, right, base, tuned in list(zip(questions, right_answers, base_answers, tuned_answers, strict=True))[
        :NUM_SHOWN
    ]:
        print(f"\n  {question[-1]['content']}")
        print(f"    base   {base.splitlines()[0][:70] if base else ''}")
        print(f"    tuned  {tuned}{'' if tuned == right else f'   (right: {right})'}")

    report = {
        "exact_match_base": exact_match(base_answers, right_answers),
        "exact_match_tuned": exact_match(tuned_answers, right_answers),
        "num_questions": len(questions),
        "train_seconds": sum(record.get("step_seconds", 0) for record in read_metrics(run_directory.metrics)),
    }
    check_no_other_file(report_path)
    with disk_errors_of("output_dir", report_path, "free space there"), whole_file(report_path) as aside:
        aside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    say(
        f"\nexact match on {report['num_questions']} held-out questions: base {report['exact_match_base']:.1%}, "
        f"tuned {report['exact_match_tuned']:.1%}, after {report['train_seconds']:.0f} s of training"
        f"\nplot   {run_directory.plot}\nreport {report_path}"
    )


def check_no_other_file(path: Path) -> None:
    """Refuse to replace anything but the report of an earlier demo.

    Raises:
        UserError: something else is there.
    """
    if os.path.lexists(path) and not is_report(path):
        raise UserError(
            f"output_dir: {str(path)!r} is not the report of a demo, and would be replaced; move it, or name another "
            "output_dir"
        )


def is_report(path: Path) -> bool:
    """Tell a demo's report by its content."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(report, dict) and "exact_match_tuned" in report


def returncode_of(command: Sequence[str]) -> int:
    """Run a command to its end. Ctrl-C is for the command: it saves and says so, and this process waits for it."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return subprocess.run(command).returncode
    finally:
        signal.signal(signal.SIGINT, before)


def exact_match(answers: list[str], right_answers: list[str]) -> float:
    """The share of answers that are the right one, character for character."""
    return sum(answer == right for answer, right in zip(answers, right_answers, strict=True)) / len(right_answers)


if __name__ == "__main__":
    run_recipe(main)
