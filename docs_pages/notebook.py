"""examples/finetune_llama2.ipynb with its outputs: executed from top to bottom on a CPU."""

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from docs_pages.blocks import PROJECT

NOTEBOOK = PROJECT / "examples/finetune_llama2.ipynb"
# An absolute path of a machine, in a text of the notebook.
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|usr|opt|var|mnt|work|data|Users|private)/")
_LIMIT_SECONDS = 600  # of a cell


def executed(notebook: Path, folder: Path) -> Any:
    """Execute a notebook with this Python, as for someone without a GPU.

    Args:
        folder: to begin in; what Jupyter keeps for a person is written to a temporary directory.

    Returns:
        nbformat's notebook with outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell has failed.
    """
    # note: extras, as of who only reads or tests.
    import nbformat
    from nbclient import NotebookClient

    content = nbformat.read(notebook, as_version=4)
    with tempfile.TemporaryDirectory() as home:
        names = ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR", "MPLCONFIGDIR")
        environment = {**dict.fromkeys(names, home), "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
        with patch.dict(os.environ, environment):
            NotebookClient(
                content,
                timeout=_LIMIT_SECONDS,
                kernel_name="python3",
                resources={"metadata": {"path": str(folder)}},
                record_timing=False,
                coalesce_streams=True,
            ).execute()
    return content


def write_notebook() -> None:
    """Execute the notebook where it is, and write it with its outputs.

    Raises:
        SystemExit: an output names a path of this machine.
    """
    import nbformat

    content = executed(NOTEBOOK, NOTEBOOK.parent)
    content.metadata.language_info = {"name": "python"}  # without the version of this machine's Python
    text = nbformat.writes(content)
    if found := MACHINE_PATH.search(text):
        sys.exit(f"error: {NOTEBOOK.name}: an output has {text[found.start() : found.start() + 60]!r}")
    NOTEBOOK.write_text(text + "\n", encoding="utf-8")
