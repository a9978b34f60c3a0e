"""Write all generated parts of docs/ and of the headers of configs/: `python -m docs_pages [PAGE ...]`."""

import re
import sys
from collections.abc import Callable

from docs_pages import cards
from docs_pages.blocks import DOCS, PROJECT, write_blocks


def main() -> None:
    for page in sys.argv[1:] or PAGES:
        PAGES[page]()


def write_cards() -> None:
    configs = {name: cards.on_cards(name) for name in cards.CONFIGS}
    write_blocks(DOCS / "cards.md", cards.blocks(configs))
    for name, config in configs.items():
        path = PROJECT / f"configs/{name}.yaml"
        text = path.read_text(encoding="utf-8")
        if "\n# Memory: " in text:
            for line in cards.header_lines(name, config):
                text = re.sub(rf"^{line[:7]}.*$", line, text, count=1, flags=re.MULTILINE)
            path.write_text(text, encoding="utf-8")


PAGES: dict[str, Callable[[], None]] = {"cards": write_cards}

if __name__ == "__main__":
    main()
