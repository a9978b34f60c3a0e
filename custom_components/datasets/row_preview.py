"""Shows rows as they will be trained."""

from collections.abc import Sequence

from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from custom_components.transforms.llama2_chat import Llama2ChatTransform

_GREEN, _PLAIN = "\033[32m", "\033[0m"
_NUM_HISTOGRAM_BINS = 10
_HISTOGRAM_WIDTH = 40


def rendered_row(row: dict[str, list[int]], tokenizer: Llama2ChatTransform, colour: bool) -> str:
    """Write a row's tokens as text, with control tokens, the supervised ones in green.

    Args:
        row: of a :class:`ChatDataset`.
        colour: False: mark supervised text with brackets instead, for terminals and files without colour.
    """
    opening, closing = (_GREEN, _PLAIN) if colour else ("\u27e6", "\u27e7")
    parts: list[str] = []
    run: list[int] = []
    for index, (token, label) in enumerate(zip(row["tokens"], row["labels"], strict=True)):
        is_supervised = label != CROSS_ENTROPY_IGNORE_IDX
        run.append(token)
        is_last_of_run = index + 1 == len(row["tokens"]) or is_supervised != (
            row["labels"][index + 1] != CROSS_ENTROPY_IGNORE_IDX
        )
        if is_last_of_run:
            text = tokenizer.text_of_pieces(run)
            parts.append(f"{opening}{text}{closing}" if is_supervised else text)
            run = []
    return "".join(parts)


def label_table(row: dict[str, list[int]], tokenizer: Llama2ChatTransform) -> str:
    """Write a line for each token: its position, id, text, and whether it is trained on."""
    lines = []
    for position, (token, label) in enumerate(zip(row["tokens"], row["labels"], strict=True)):
        trained = "" if label == CROSS_ENTROPY_IGNORE_IDX else "trained"
        lines.append(f"{position:>6} {token:>6}  {tokenizer.text_of_pieces([token])!r:<24} {trained}".rstrip())
    return "\n".join(lines)


def length_histogram(lengths: Sequence[int]) -> str:
    """Draw the rows by their number of tokens, as bars of text of at most 80 columns."""
    bin_width = -(-(max(lengths) + 1) // _NUM_HISTOGRAM_BINS)
    counts = [0] * _NUM_HISTOGRAM_BINS
    for length in lengths:
        counts[length // bin_width] += 1
    lines = []
    for index, count in enumerate(counts):
        bar = "#" * -(-count * _HISTOGRAM_WIDTH // max(counts))
        lines.append(f"{index * bin_width:>6} to {(index + 1) * bin_width - 1:<6} {bar} {count or ''}".rstrip())
    return "\n".join(lines)
