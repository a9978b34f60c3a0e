"""Generated blocks of a page: what is between two marks is replaced, the rest is written by hand."""

import re
from pathlib import Path

PROJECT = Path(__file__).parents[1]
DOCS = PROJECT / "docs"
_BLOCK = re.compile(
    r"(<!-- begin (?P<name>[\w-]+), made by python -m docs_pages -->\n)(?P<text>.*?)(<!-- end -->)", re.DOTALL
)


def blocks_of(page: Path) -> dict[str, str]:
    """Read the generated blocks of a page by name."""
    return {match["name"]: match["text"] for match in _BLOCK.finditer(page.read_text(encoding="utf-8"))}


def write_blocks(page: Path, blocks: dict[str, str]) -> bool:
    """Put new texts into the blocks of a page.

    Returns:
        whether the page has changed.

    Raises:
        ValueError: the page has other blocks than these.
    """
    before = page.read_text(encoding="utf-8")
    if set(blocks) != set(blocks_of(page)):
        raise ValueError(f"{page.name} has the blocks {sorted(blocks_of(page))}, not {sorted(blocks)}")
    after = _BLOCK.sub(lambda match: match[1] + blocks[match["name"]] + match[4], before)
    page.write_text(after, encoding="utf-8")
    return after != before


def table(heads: list[str], rows: list[list[str]], *, numbers: bool = False) -> str:
    """Write a Markdown table.

    Args:
        numbers: columns after the first are aligned to the right.
    """
    rules = ["---", *["---:" if numbers else "---"] * (len(heads) - 1)]
    lines = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in (heads, rules, *rows))
    return "\n" + "".join(f"| {line} |\n" for line in lines) + "\n"


def plain(words: str) -> str:
    """Write what Markdown would read as a tag, an escape or emphasis in a way that it leaves alone."""
    escaped = words.replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\*]|(?<!\w)_|_(?!\w)", lambda match: "\\" + match[0], escaped)
