"""Rows per second of a plain SentencePiece loop, of our tokenizing, of reading our cache, and of `datasets` with
transformers' fast tokenizer, which gives ids without labels.

    python -m benchmarks.tokenizing --tokenizer checkpoints/Llama-2-7b-hf/tokenizer.model --source rows.jsonl

Rows are those of the source, repeated with a number at the end until there are enough.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sentencepiece

from custom_components.datasets.chat import chat_dataset
from custom_components.datasets.row_formats import recognised_format
from custom_components.datasets.sources import read_rows
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.sentencepiece_tokenizer import SentencePieceTokenizer
from custom_components.transforms.templates import llama2_turns
from custom_components.transforms.tokenizer_json import fast_tokenizer


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

    with timed("plain loop", len(repeated)):
        for dialog in repeated:
            tokens: list[int] = []
            mask: list[bool] = []
            for turn in llama2_turns(dialog):
                prompt, answer = turn.prompt[1], turn.answer[0] if turn.answer else ""  # without BOS and EOS
                prompt_ids = processor.encode(prompt)
                turn_ids = [1, *processor.encode(prompt + answer), 2]
                tokens += turn_ids
                mask += [True] * (1 + len(prompt_ids)) + [False] * (len(turn_ids) - 1 - len(prompt_ids))

    with timed("render and encode_turns", len(repeated)):
        for first in range(0, len(repeated), 1024):
            transform.encode_turns([transform.render(dialog) for dialog in repeated[first : first + 1024]])

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rows.jsonl"
        messages = ([{"role": message.role, "content": message.content} for message in dialog] for dialog in repeated)
        source.write_text("".join(json.dumps({"messages": dialog}) + "\n" for dialog in messages))
        for name in ("chat_dataset, first run", "chat_dataset, from the cache"):
            with timed(name, len(repeated)):
                chat_dataset(transform, str(source), cache_dir=Path(folder) / "cache")
        time_datasets(source, transform, len(repeated), Path(folder))


def time_datasets(source: Path, transform: Llama2ChatTransform, num_rows: int, folder: Path) -> None:
    """Time `datasets.map` over the same file with transformers' fast tokenizer, batched, in one process."""
    import datasets
    import transformers

    tokenizer = transform.tokenizer
    assert isinstance(tokenizer, SentencePieceTokenizer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer(tokenizer.processor, tokenizer.added_tokens.tokens)
    )

    def encoded(batch: dict[str, list[list[dict[str, str]]]]) -> dict[str, list[list[int]]]:
        texts = []
        for dialog in batch["messages"]:
            turns = zip(dialog[::2], dialog[1::2], strict=True)
            texts.append("".join(f"<s>[INST] {q['content']} [/INST] {a['content']} </s>" for q, a in turns))
        return {"input_ids": fast(texts, add_special_tokens=False)["input_ids"]}

    datasets.disable_progress_bars()
    with timed("datasets and a fast tokenizer", num_rows):
        rows = datasets.Dataset.from_json(str(source), cache_dir=str(folder / "datasets"))
        rows.map(encoded, batched=True, remove_columns=rows.column_names)


@contextmanager
def timed(name: str, num_rows: int) -> Iterator[None]:
    """Print how long a block takes, on the clock and of all processors."""
    start, start_cpu = time.perf_counter(), cpu_seconds()
    yield
    seconds = time.perf_counter() - start
    print(f"{name:<30} {seconds:7.2f} s {cpu_seconds() - start_cpu:7.2f} CPU s {num_rows / seconds:10.0f} rows/s")


def cpu_seconds() -> float:
    """Give the time that the processors gave to this process and to those that it started and that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
