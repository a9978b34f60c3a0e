"""Imports between rooms run one way, as the table says; recipes on top, never each other."""

import ast

import pytest

from tests.support.paths import PROJECT

# The rooms of custom_components/, and those that each may import. No arrow runs up.
ROOMS = {
    "runtime": "",
    "config": "runtime",
    "transforms": "runtime",
    "models": "runtime transforms",  # for one name: torchtune has its tokenizer's builder beside its models'
    "datasets": "runtime transforms",
    "distributed": "runtime models",
    "weights": "runtime models distributed",
    "training": "runtime config datasets models",
    "memory": "runtime datasets models training",
    "runs": "runtime config transforms datasets weights training",
    "generation": "runtime transforms models",
    "evaluation": "runtime transforms datasets models generation",
    "export": "runtime transforms models weights",
    "recipe_parts": "runtime distributed config transforms datasets models weights training memory runs generation",
}
COMPONENTS = PROJECT / "custom_components"
SOURCES = {
    ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("custom_components", "recipes")
    for path in sorted((PROJECT / folder).rglob("*.py"))
}


def room(module: str) -> str:
    return module.split(".")[1]


def imported_modules(path) -> set[str]:
    """The project's modules that a file imports, also inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & set(SOURCES)
            modules |= inside or {node.module}
    return {module for module in modules & set(SOURCES) if "." in module}


def test_every_file_is_in_a_room_of_the_table():
    folders = {path.name for path in COMPONENTS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(ROOMS)
    assert [path.name for path in COMPONENTS.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("name", [name for name in SOURCES if "." in name])
def test_imports_run_one_way(name):
    imports = imported_modules(SOURCES[name])
    assert not [imported for imported in imports if imported.startswith("recipes.")]
    if name.startswith("custom_components."):
        allowed = {room(name), *ROOMS[room(name)].split()}
        assert [imported for imported in sorted(imports) if room(imported) not in allowed] == []


def test_one_room_knows_of_process_groups():
    """Everything else works on one process as on several; DoRA knows the tensors that torchtune's recipes shard."""
    importing = {
        name
        for name, path in SOURCES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        for imported in imported_names(node)
        if imported.startswith("torch.distributed") and not imported.startswith("torch.distributed.tensor")
    }
    assert {room(name) for name in importing} == {"distributed"}


def imported_names(node) -> list[str]:
    """The dotted names that a statement imports."""
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def lines_beside_the_loop(path) -> list[str]:
    """A training recipe's lines of code, without imports, docstrings and its `train`, which is the visible loop."""
    source = path.read_text()
    lines: list[str | None] = list(source.splitlines())
    for node in ast.walk(ast.parse(source)):
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_loop = isinstance(node, ast.FunctionDef) and node.name == "train"
        if is_docstring or is_loop or isinstance(node, ast.Import | ast.ImportFrom):
            lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
    return [line.strip() for line in lines if line and line.strip()]


def test_beside_the_visible_loop_no_six_lines_stand_in_two_training_recipes():
    places: dict[tuple[str, ...], set[str]] = {}
    recipes = [path for path in (PROJECT / "recipes").glob("*.py") if "signal_number = train(" in path.read_text()]
    assert len(recipes) == 4
    for path in recipes:
        lines = lines_beside_the_loop(path)
        code = "\n".join(lines)
        assert "def recipe_main(" in code and "for step in plan.steps" not in code
        for start in range(len(lines) - 5):
            places.setdefault(tuple(lines[start : start + 6]), set()).add(path.name)
    assert [lines for lines, names in places.items() if len(names) > 1] == []


def test_a_file_is_short_enough_for_one_responsibility():
    lengths = {name: len(path.read_text().splitlines()) for name, path in SOURCES.items()}
    assert {name: length for name, length in lengths.items() if length > 300} == {}


def test_the_table_of_rooms_has_no_circle_and_no_arrow_that_nobody_uses():
    above: set[str] = set()
    for name, allowed in ROOMS.items():
        assert set(allowed.split()) <= above, name
        above.add(name)
    used = {
        (room(name), room(imported))
        for name, path in SOURCES.items()
        if name.startswith("custom_components.")
        for imported in imported_modules(path)
        if room(imported) != room(name)
    }
    assert used == {(name, other) for name, allowed in ROOMS.items() for other in allowed.split()}


def test_no_import_circle_between_files():
    imports = {name: imported_modules(path) - {name} for name, path in SOURCES.items()}
    while leaves := [name for name, imported in imports.items() if not imported]:
        for leaf in leaves:
            del imports[leaf]
        for imported in imports.values():
            imported.difference_update(leaves)
    assert not imports


@pytest.mark.parametrize("path", sorted((PROJECT / "tests").rglob("*.py")), ids=lambda path: path.stem)
def test_no_test_imports_another_test(path):
    """What tests share is in tests/support/, and fixtures, which nobody imports, in conftest.py."""
    imported = {
        node.module
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tests"
    }
    assert {module for module in imported if not module.startswith("tests.support.")} == set()
