"""A preview as a page of HTML: one file, with nothing in it that a browser would fetch or run."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from custom_components.datasets.row_preview import ShownRow, Span
from custom_components.runtime.output_file import replaced_file

# By this an earlier page is known, which may be replaced.
_GENERATOR = '<meta name="generator" content="llama-lora-recipes preview">'
_HEAD = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
{_GENERATOR}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Rows as they are trained on</title>
<style>
:root {{ color-scheme: light dark; --trained: #d4f0d4; --control: #5b3aa0; --edge: #b0b0b0; --bad: #b3261e }}
@media (prefers-color-scheme: dark) {{
  :root {{ --trained: #1f4d2b; --control: #c3a6ff; --edge: #555; --bad: #ff8a80 }}
}}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem }}
h1 {{ font-size: 1.4rem }}
h2 {{ font-size: 1rem; margin: 2rem 0 .3rem; overflow-wrap: anywhere }}
p {{ margin: .3rem 0 }}
.fate {{ opacity: .8 }}
.bad {{ color: var(--bad) }}
pre, .row {{ font: 14px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }}
.row, pre {{ border: 1px solid var(--edge); border-radius: 6px; padding: .6rem; margin: .3rem 0 }}
.trained {{ background: var(--trained) }}
.control {{ color: var(--control); border: 1px solid currentColor; border-radius: 4px }}
.control {{ padding: 0 .2em; font-size: .85em }}
.scroll {{ overflow-x: auto }}
.bars {{ white-space: pre; overflow-x: auto }}
table {{ border-collapse: collapse; font: 14px/1.4 ui-monospace, monospace }}
th, td {{ text-align: left; padding: .1rem .6rem; border-bottom: 1px solid var(--edge); white-space: pre }}
td.number {{ text-align: right }}
</style>
<h1>Rows as they are trained on</h1>
<p><span class="trained">Text like this</span> is trained on, <span class="control">&lt;/s&gt;</span> is a control token
and not text.</p>
"""


@dataclass
class PreviewPage:
    """Collects what is shown."""

    parts: list[str] = field(default_factory=lambda: [_HEAD])

    def add_row(self, row: ShownRow) -> None:
        bad = "" if row.spans else " bad"
        self.parts.append(f'<h2>{escape(row.name)}</h2>\n<p class="fate{bad}">{escape(row.fate)}</p>\n')
        if row.spans or row.record:
            text = "".join(map(_span, row.spans)) or escape(row.record)
            self.parts.append(f'<div class="row">{text}</div>\n')
        if row.tokens:
            lines = "".join(
                f'<tr><td class="number">{line.position}<td class="number">{line.token}<td>{_span(line.span)}\n'
                for line in row.tokens
            )
            self.parts.append(f'<div class="scroll"><table><tr><th>position<th>id<th>text\n{lines}</table></div>\n')

    def add_text(self, title: str, text: str, *, is_drawing: bool = False) -> None:
        """Add lines of text.

        Args:
            is_drawing: its lines are not to be broken.
        """
        style = ' class="bars"' if is_drawing else ""
        self.parts.append(f"<h2>{escape(title)}</h2>\n<pre{style}>{escape(text)}</pre>\n")


@contextlib.contextmanager
def page_file(path: Path | None) -> Iterator[PreviewPage]:
    """Yield a page that is written to `path` when the block succeeds; None: it is not written.

    Raises:
        UserError: nothing can be written there, or something else than an earlier page is there; this is checked before
            the block begins.
    """
    page = PreviewPage()
    if path is None:
        yield page
        return
    with replaced_file(path, _is_page, "the page of a preview") as aside:
        yield page
        aside.write_text("".join(page.parts), encoding="utf-8", errors="backslashreplace")


def _span(span: Span) -> str:
    text = escape(span.text)
    if span.is_control:
        text = f'<span class="control">{text}</span>'
    return f'<span class="trained">{text}</span>' if span.is_supervised else text


def _is_page(path: Path) -> bool:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.is_file() and _GENERATOR in path.read_text(encoding="utf-8")[: len(_HEAD)]
    return False
