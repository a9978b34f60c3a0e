"""A comparison of runs as a page of HTML: one file, with nothing in it that a browser would fetch or run."""

import base64
import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from custom_components.runs.comparison import TableRow
from custom_components.runs.comparison_plot import loss_curves, run_style
from custom_components.runs.recorded_run import RecordedRun
from custom_components.runtime.output_file import replaced_file

# By this an earlier page is known, which may be replaced.
_GENERATOR = '<meta name="generator" content="llama-lora-recipes comparison">'
_HEAD = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
{_GENERATOR}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>Runs compared</title>
<style>
:root {{ color-scheme: light dark; --edge: #b0b0b0; --back: #fff }}
@media (prefers-color-scheme: dark) {{ :root {{ --edge: #555; --back: #1e1e1e }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 0 auto; padding: 1rem }}
body {{ background: var(--back) }}
h1 {{ font-size: 1.4rem }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 .3rem }}
h3 {{ font-size: 1rem; margin: 1.2rem 0 .3rem; overflow-wrap: anywhere; white-space: pre-wrap }}
p {{ margin: .3rem 0 }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); gap: .6rem }}
.curves img {{ width: 100%; background: #fff; border-radius: 6px }}
.runs {{ display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; list-style: none }}
.runs li {{ overflow-wrap: anywhere }}
.mark {{ display: inline-block; width: 1.6em; border-top: 4px; margin-right: .4em; vertical-align: middle }}
.scroll {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: .9rem }}
th, td {{ padding: .25rem .7rem; border-bottom: 1px solid var(--edge); text-align: right; vertical-align: top }}
th {{ font-weight: 600 }}
td {{ min-width: 6.5rem; max-width: 16rem; overflow-wrap: anywhere; font-variant-numeric: tabular-nums }}
th:first-child {{ position: sticky; left: 0; background: var(--back); text-align: left; white-space: pre }}
tbody th {{ font-weight: 400 }}
@media (max-width: 40rem) {{
  th, td {{ padding: .25rem .4rem }}
  th:first-child {{ white-space: pre-wrap; min-width: 7.5rem; padding-left: 0 }}
}}
.first td, .first th {{ border-top: 2px solid var(--edge) }}
.answers {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(16rem, 100%), 1fr)); gap: .6rem }}
.answers > div {{ border: 1px solid var(--edge); border-radius: 6px; padding: .5rem .7rem; overflow-wrap: anywhere }}
.answers pre {{ font: inherit; white-space: pre-wrap; margin: .2rem 0 0 }}
.who {{ font-size: .85rem; opacity: .85 }}
</style>
<h1>Runs compared</h1>
"""


@dataclass
class ComparisonPage:
    """Collects what is shown."""

    parts: list[str] = field(default_factory=lambda: [_HEAD])

    def add_curves(self, runs: Sequence[RecordedRun]) -> None:
        """Add the loss curves over steps and over tokens; those per pair have pictures of their own."""
        names = "".join(f"<li>{_mark(index)}{escape(run.name)}\n" for index, run in enumerate(runs))
        self.parts.append(
            f"<h2>Loss</h2>\n<p>Thin lines: training, a running mean. Thick lines with dots: validation.</p>\n"
            f'<ul class="runs">\n{names}</ul>\n'
        )
        pictures = []
        for has_pairs in (False, True):
            of_unit = {index: run for index, run in enumerate(runs) if run.has_pairs == has_pairs and run.steps}
            for over_tokens in (False, True):
                if of_unit and (svg := loss_curves(of_unit, over_tokens=over_tokens)) is not None:
                    what = f"Loss over {'tokens' if over_tokens else 'optimizer steps'} of "
                    pictures.append(_picture(svg, what + ", ".join(run.name for run in of_unit.values())))
        self.parts.append(f'<div class="curves">\n{"".join(pictures)}</div>\n')
        if not pictures:
            self.parts.append("<p>No run has taken a step yet.</p>\n")

    def add_table(self, names: Sequence[str], differences: Sequence[TableRow], measures: Sequence[TableRow]) -> None:
        heads = "".join(f"<th>{_mark(index)}{escape(name)}" for index, name in enumerate(names))
        body = "".join(map(_table_row, differences)) + _table_row(measures[0], is_first=True)
        body += "".join(map(_table_row, measures[1:]))
        none = "" if differences or len(names) == 1 else "<p>Their configs do not differ.</p>\n"
        self.parts.append(
            "<h2>What differs, and what came of it</h2>\n"
            f'{none}<div class="scroll"><table><thead><tr><th>{heads}</thead><tbody>\n{body}</tbody></table></div>\n'
        )

    def add_answers(self, prompt: str, answers: Mapping[str, str]) -> None:
        """Add the answers to a prompt, side by side.

        Args:
            answers: by what is said of each: the run's name, and the step.
        """
        cells = "".join(
            f'<div><div class="who">{escape(who)}</div><pre>{escape(answer) or "(nothing)"}</pre></div>\n'
            for who, answer in answers.items()
        )
        self.parts.append(f'<h3>{escape(prompt)}</h3>\n<div class="answers">\n{cells}</div>\n')

    def add_heading(self, title: str) -> None:
        self.parts.append(f"<h2>{escape(title)}</h2>\n")

    def add_words(self, words: str) -> None:
        self.parts.append(f"<p>{escape(words)}</p>\n")


@contextlib.contextmanager
def comparison_page_file(path: Path | None) -> Iterator[ComparisonPage]:
    """Yield a page that is written to `path` when the block succeeds; None: it is not written.

    Raises:
        UserError: nothing can be written there, or something else than an earlier page is there; this is checked before
            the block begins.
    """
    page = ComparisonPage()
    if path is None:
        yield page
        return
    with replaced_file(path, _is_page, "the page of a comparison") as aside:
        yield page
        aside.write_text("".join(page.parts), encoding="utf-8", errors="backslashreplace")


def _picture(svg: str, words: str) -> str:
    data = base64.b64encode(svg.encode("utf-8")).decode("ascii")
    return f'<img alt="{escape(words)}" src="data:image/svg+xml;base64,{data}">\n'


def _mark(index: int) -> str:
    colour, dashes = run_style(index)
    # note: CSS has no dash-dotted border.
    border = "double" if dashes == "dashdot" else dashes
    return f'<span class="mark" style="border-top-style: {border}; border-color: {colour}"></span>'


def _table_row(row: TableRow, *, is_first: bool = False) -> str:
    cells = "".join(f"<td>{escape(cell)}" for cell in row.cells)
    label = re.sub("[_.]", r"\g<0><wbr>", escape(row.label))  # where a narrow screen may break it
    return f"<tr{' class=first' if is_first else ''}><th>{label}{cells}\n"


def _is_page(path: Path) -> bool:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.is_file() and _GENERATOR in path.read_text(encoding="utf-8")[: len(_HEAD)]
    return False
