"""Rows per second of a plain SentencePiece loop, of our tokenizing, and of reading our cache.

    python -m benchmarks.tokenizing --tokenizer checkpoints/Llama-2-7b-hf/tokenizer.model --source rows.jsonl

Rows are those of the source, repeated with a number at the end until there are enough.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import sentencepiece

from custom_components.datasets.chat import chat_dataset
from custom_components.datasets.row_formats import recognised_format
from custom_components.datasets.sources import read_rows
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.templates import llama2_turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--num-rows", type=int, default=50_000)
    arguments = parser.parse_args()

    rows = [row.values for row in read_rows(arguments.source)]
    convert = recognised_format(rows[0].keys(), rows[0]).convert
    dialogs = [dialog for row in rows if (dialog := convert(row))]
    repeated = [
        [*dialog[:-1], type(dialog[-1])("assistant", f"{dialog[-1].content} {number}")]
        for number, dialog in zip(
            range(arguments.num_rows), dialogs * (arguments.num_rows // len(dialogs) + 1), strict=False
        )
    ]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(arguments.tokenizer))
    transform = Llama2ChatTransform(arguments.tokenizer)

    start = time.perf_counter()
    for dialog in repeated:
        tokens: list[int] = []
        mask: list[bool] = []
        for turn in llama2_turns(dialog):
            prompt, answer = turn.prompt[1], turn.answer[0] if turn.answer else ""  # without BOS and EOS
            prompt_ids = processor.encode(prompt)
            turn_ids = [1, *processor.encode(prompt + answer), 2]
            tokens += turn_ids
            mask += [True] * (1 + len(prompt_ids)) + [False] * (len(turn_ids) - 1 - len(prompt_ids))
    loop_seconds = time.perf_counter() - start
    report("plain loop", len(repeated), loop_seconds, loop_seconds)

    start = time.perf_counter()
    for first in range(0, len(repeated), 1024):
        transform.encode_turns([transform.render(dialog) for dialog in repeated[first : first + 1024]])
    report("render and encode_turns", len(repeated), time.perf_counter() - start, loop_seconds)

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rows.jsonl"
        messages = ([{"role": message.role, "content": message.content} for message in dialog] for dialog in repeated)
        source.write_text("".join(json.dumps({"messages": dialog}) + "\n" for dialog in messages))
        for name in ("chat_dataset, first run", "chat_dataset, from the cache"):
            start = time.perf_counter()
            chat_dataset(transform, str(source), cache_dir=Path(folder) / "cache")
            report(name, len(repeated), time.perf_counter() - start, loop_seconds)


def report(name: str, num_rows: int, seconds: float, loop_seconds: float) -> None:
    print(f"{name:<30} {seconds:7.2f} s {num_rows / seconds:10.0f} rows/s {loop_seconds / seconds:6.2f} x the loop")


if __name__ == "__main__":
    main()
