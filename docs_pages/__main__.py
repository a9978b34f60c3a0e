"""Write all generated parts of docs/, of configs/ and of the notebook: `python -m docs_pages [PAGE ...]`."""

import re
import sys
from collections.abc import Callable

from docs_pages import cards, moving, notebook, pictures, settings
from docs_pages.blocks import DOCS, PROJECT, write_blocks


def main() -> None:
    """Write the pages that are named, or all.

    Raises:
        SystemExit: there is no such page.
    """
    if unknown := [page for page in sys.argv[1:] if page not in PAGES]:
        sys.exit(f"error: {', '.join(unknown)}: not one of {', '.join(PAGES)}")
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


def write_moving() -> None:
    write_blocks(DOCS / "moving.md", moving.blocks())


def write_settings() -> None:
    (DOCS / "settings.md").write_text(settings.page(), encoding="utf-8")


PAGES: dict[str, Callable[[], None]] = {
    "settings": write_settings,
    "moving": write_moving,
    "pictures": pictures.write_pictures,
    "cards": write_cards,
    "notebook": notebook.write_notebook,
}

if __name__ == "__main__":
    main()
