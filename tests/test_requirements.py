"""What pyproject.toml says is needed: all that is imported, in ranges whose ends were tried."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support.paths import PROJECT, TINY_LLAMA
from tests.support.tune_process import python_process, write_tune

METADATA = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = {canonicalize_name(r.name): r for r in map(Requirement, METADATA["dependencies"])}
EXTRAS = {
    canonicalize_name(Requirement(text).name)
    for extra, texts in METADATA["optional-dependencies"].items()
    if extra != "dev"
    for text in texts
}
TESTED = {
    canonicalize_name(r.name): Version(next(iter(r.specifier)).version)
    for line in (PROJECT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
    for r in [Requirement(line)]
}


def lower_bound(requirement: Requirement) -> str:
    [bound] = [spec.version for spec in requirement.specifier if spec.operator in (">=", "==")]
    return bound


def imported_distributions() -> dict[str, str]:
    """The distributions that the package and the recipes import, each with one of the files."""
    distributions = importlib.metadata.packages_distributions()
    found = {}
    for folder in ("custom_components", "recipes"):
        for path in (PROJECT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
                for name in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names):
                    for distribution in distributions.get(name, []):
                        found[canonicalize_name(distribution)] = f"{path}: {name}"
    return found


def test_every_import_is_declared():
    """transformers and peft are for tests only."""
    of_ours = {"llama-lora-recipes"}
    undeclared = imported_distributions().keys() - DEPENDENCIES.keys() - EXTRAS - of_ours
    assert not {name: place for name, place in imported_distributions().items() if name in undeclared}


def test_every_range_begins_somewhere_and_holds_what_was_tested():
    for name, requirement in DEPENDENCIES.items():
        assert Version(lower_bound(requirement)) <= TESTED[name]
        assert requirement.specifier.contains(TESTED[name]), name


def test_torchs_range_ends_at_what_was_tested():
    """A new minor version of torch has broken torchtune and torchao before."""
    [end] = [spec.version for spec in DEPENDENCIES["torch"].specifier if spec.operator == "<"]
    assert Version(end).release[:2] == (TESTED["torch"].major, TESTED["torch"].minor + 1)


@pytest.mark.slow
def test_the_lower_bounds_install_together_and_train_and_answer():
    """All but torch: 2.11, which was tried once, comes as a CUDA build of several GB where no CPU build is provided."""
    pins = [f"{name}=={lower_bound(requirement)}" for name, requirement in DEPENDENCIES.items() if name != "torch"]
    pins += [f"torch=={TESTED['torch']}"]
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "environment"
        subprocess.run([sys.executable, "-m", "venv", environment], check=True, timeout=300)
        python = environment / "bin/python"
        install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *pins]
        installed = subprocess.run(install, capture_output=True, text=True, timeout=1500)
        if installed.returncode and "ResolutionImpossible" not in installed.stderr:
            pytest.skip(f"the packages cannot be had: {installed.stderr.strip().splitlines()[-1]}")
        assert installed.returncode == 0, installed.stderr

        tune = write_tune(Path(folder))

        def run(recipe: str, *overrides: str) -> str:
            config = {"lora_single_device": "tiny_qlora"}.get(recipe, recipe)
            arguments = ["run", f"recipes/{recipe}.py", "--config", f"configs/{config}.yaml", *overrides]
            result = python_process(tune, *arguments, python=python, timeout=400)
            assert result.returncode == 0, result.stderr
            lines = [line for line in result.stderr.splitlines() if not re.match(r"step \d+/|.*\d+%\|", line)]
            assert lines == []
            return result.stdout

        run("lora_single_device", "max_steps=2", f"output_dir={folder}/out", "cache_dir=null", "device=cpu")
        of_run = [f"checkpoint_dir={TINY_LLAMA}/checkpoint", f"adapter_dir={folder}/out/adapter"]
        assert run("generate", *of_run, "prompt=Who?", "max_new_tokens=5", "device=cpu").strip()
        assert "merged" in run("merge", *of_run, f"output_dir={folder}/merged")
