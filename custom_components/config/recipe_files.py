"""Finding recipes and configs by the names that people type. They are read as text: nothing is imported."""

import ast
import difflib
import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import custom_components
from custom_components.runtime.errors import UserError
from custom_components.runtime.terminal import say

# torchtune 0.6.1, torchtune/_recipe_registry.py: `Recipe(name="...", ...)`, `Config(name="...", ...)`.
_REGISTRY_NAME = re.compile(r'\bname="([^"]+)"')
# As recipes' docstrings and configs' first lines write it.
_COMMAND = re.compile(r"tune run (?:--\w+ \S+ )*(?P<recipe>\S+\.py)\s+--config\s+(?P<config>configs/\w+\.yaml)")
HELP_FLAGS = ("--help", "-h")
_COLUMN_WIDTH = 36  # narrower than torchtune's, so that the longest name of a config ends within 80 columns


@dataclass(frozen=True)
class Project:
    """A checkout of this project, whose recipes and configs can be named from any directory.

    Attributes:
        path: None: the package was installed from a wheel, which holds neither.
        working_directory: where names are looked for first.
    """

    path: Path | None
    working_directory: Path

    @classmethod
    def around(cls, working_directory: Path) -> "Project":
        """Find the checkout that is the working directory, else the one that was installed."""
        for path in (working_directory, Path(custom_components.__file__).parents[1]):
            if (path / "recipes/__init__.py").is_file() and (path / "configs").is_dir():
                return cls(path, working_directory)
        return cls(None, working_directory)

    @property
    def recipes(self) -> list[Path]:
        found = sorted(self.path.glob("recipes/*.py")) if self.path else []
        return [path for path in found if path.name != "__init__.py"]

    @property
    def configs(self) -> list[Path]:
        return sorted(self.path.glob("configs/*.yaml")) if self.path else []

    def named(self, name: str, suffixes: Sequence[str] = (".py", ".yaml")) -> Path | None:
        """Find a recipe or config of the project: `recipes/x.py`, `x.py`, `x`, or a path to it."""
        files = [file for file in (*self.recipes, *self.configs) if file.suffix in suffixes]
        for file in files:
            if name in (self.short_name(file), file.name, file.stem):
                return file
        for folder in (self.working_directory, self.path):
            for file in files:
                if folder is not None and (folder / name).resolve() == file.resolve():
                    return file
        return None

    def short_name(self, file: Path) -> str:
        assert self.path is not None
        return file.relative_to(self.path).as_posix()

    def config_path(self, name: str) -> str:
        """Give the path of a named config: an existing path is taken as it is, else the project's own is found."""
        if (self.working_directory / name).exists() or (found := self.named(name, [".yaml"])) is None:
            return name
        return self.said(name, found, f"; relative paths in it count from {self.working_directory}")

    def existing_config(self, name: str | None) -> Path | None:
        """Give the file of a named config, if it exists."""
        path = None if name is None else Path(self.config_path(name))
        return path if path is not None and path.is_file() else None

    def said(self, name: str, found: Path, consequence: str = "") -> str:
        """Give the path of the project's file of this name, and print it if it is not in the working directory."""
        if self.path != self.working_directory:
            say(f"{name}: taken from {self.path}{consequence}", sys.stderr)
        return str(found)

    def listing(self) -> str:
        """List the project for `tune ls`: each recipe with the configs that are for it."""
        if self.path is None:
            return "no recipes of this project: they are in a checkout of it, `tune ls` shows them there"
        texts = [file.read_text(encoding="utf-8") for file in [*self.recipes, *self.configs]]
        pairs = {(match["recipe"], match["config"]) for text in texts for match in _COMMAND.finditer(text)}
        lines = [f"{'RECIPE':<{_COLUMN_WIDTH}}CONFIG"]
        for recipe in map(self.short_name, self.recipes):
            configs = sorted(config for of, config in pairs if of == recipe) or ["<>"]
            lines += [
                f"{name:<{_COLUMN_WIDTH}}{config}" for name, config in zip([recipe, *[""] * 99], configs, strict=False)
            ]
        return "\n".join(lines)


def find_recipe(name: str, project: Project) -> Path:
    """Find the file that `tune run` is to run.

    Raises:
        UserError: there is none.
    """
    for text in (name, f"{name}.py", f"{name.replace('.', '/')}.py"):
        if (file := project.working_directory / text).is_file():
            return file
    found = project.named(name, [".py"])
    if found is not None:
        return Path(project.said(name, found))
    by_stem = {file.stem: project.short_name(file) for file in project.recipes}
    by_stem |= {torchtune_name: torchtune_name for torchtune_name in torchtune_names() if "/" not in torchtune_name}
    near = difflib.get_close_matches(Path(name).name.removesuffix(".py"), list(by_stem), n=1)
    hint = f"did you mean {by_stem[near[0]]!r}?" if near else "`tune ls` lists those that there are"
    raise UserError(f"recipe {name!r}: no such file in {project.working_directory}, and no recipe of that name; {hint}")


def import_root(recipe: Path) -> tuple[Path, str]:
    """Find the folder from which a recipe is imported, and its path from there.

    Raises:
        UserError: a name that Python cannot import.
    """
    recipe = recipe.parent.resolve() / recipe.name
    root = recipe.parent
    while (root / "__init__.py").is_file():
        root = root.parent
    module_path = recipe.relative_to(root)
    if recipe.suffix != ".py" or any("." in part for part in module_path.with_suffix("").parts):
        raise UserError(f"recipe {str(recipe)!r}: cannot be imported by that name; call it NAME.py, without other dots")
    return root, module_path.as_posix()


def config_named_in(description: str) -> str | None:
    """Find the config in the example command of a recipe's docstring."""
    match = _COMMAND.search(description)
    return match["config"] if match else None


def docstring(recipe: Path) -> str:
    """Read a recipe's docstring; empty for a file that is not Python."""
    try:
        return ast.get_docstring(ast.parse(recipe.read_bytes())) or ""
    except (SyntaxError, ValueError):
        return ""


def torchtune_names() -> set[str]:
    """Collect the names of torchtune's own recipes and configs."""
    spec = importlib.util.find_spec("torchtune")
    folders = spec.submodule_search_locations if spec else None
    registry = Path(folders[0]) / "_recipe_registry.py" if folders else None
    if registry is None or not registry.is_file():
        return set()
    return set(_REGISTRY_NAME.findall(registry.read_text(encoding="utf-8")))
