"""The `tune` command in a process of its own, started by this checkout's .pth file whatever the environment has."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.paths import PROJECT

# Twice, as Python does it in a virtual environment.
_SCRIPT = f"""\
for _ in range(2):
    exec(open({str(PROJECT / "llama_lora_recipes.pth")!r}).read())
from torchtune._cli.tune import main
main()
"""


def write_tune(folder: Path) -> Path:
    """Write a script that does what the installed `tune` does after `make setup`."""
    script = folder / "bin/tune"
    script.parent.mkdir()
    script.write_text(_SCRIPT)
    return script


def python_process(
    *arguments: str | Path,
    directory: Path = PROJECT,
    first_path: Path | None = None,
    timeout: float = 120,
    python: str | Path = sys.executable,
) -> subprocess.CompletedProcess[str]:
    """Run Python with this checkout importable from any directory, after what is in `first_path`."""
    path = os.pathsep.join(str(folder) for folder in (first_path, PROJECT) if folder)
    return subprocess.run(
        [str(python), *map(str, arguments)],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )
