"""The parameters of a component, read from its source: importing it may take seconds, and run any code."""

import ast
import functools
import importlib.util
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_LARGEST_NUM_HOPS = 10
_TYPES: dict[str, Any] = {
    **{"PositiveInt": int, "NonNegativeInt": int, "PositiveFloat": float},
    **{"bool": bool, "int": int, "float": float, "str": str, "Path": Path, "PathLike": Path},
    **{"list": list, "List": list, "Sequence": Sequence, "tuple": list, "Tuple": list, "Iterable": Sequence},
    **{"dict": dict, "Dict": dict, "Mapping": Mapping},
}


@dataclass(frozen=True)
class Parameter:
    """A parameter as it is written.

    Attributes:
        annotation: its type; Any where it is none of those that a config can spell.
        default: its default's source; None: it has to be given.
    """

    name: str
    annotation: Any
    default: str | None


def parameters_in_source(dotted_path: str) -> list[Parameter]:
    """Read the parameters of a function, a class's `__init__` or a `partial` of one; empty where none are found."""
    function, num_bound = _function(dotted_path)
    if function is None:
        return []
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    positional_defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = [
        *zip(positional, positional_defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    return [
        Parameter(argument.arg, annotation_of(argument.annotation), ast.unparse(default) if default else None)
        for argument, default in pairs[num_bound:]
    ]


def annotation_of(node: ast.expr | None) -> Any:
    """Give the type that an annotation's source means; Any for names that are not known here."""
    match node:
        case ast.Constant(value=None):
            return type(None)
        case ast.Constant(value=str() as text):
            return annotation_of(ast.parse(text, mode="eval").body)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return _TYPES.get(name, Any)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return annotation_of(left) | annotation_of(right)
        case ast.Subscript(value=ast.Name(id=name) | ast.Attribute(attr=name), slice=inner):
            items = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            if name == "Literal":
                return Literal[tuple(item.value for item in items if isinstance(item, ast.Constant))]
            if name == "Annotated":
                return annotation_of(items[0])
            if name in ("Union", "Optional"):
                members = [*map(annotation_of, items), *([type(None)] if name == "Optional" else [])]
                return functools.reduce(operator.or_, members)
            outer = _TYPES.get(name, Any)
            return outer[annotation_of(items[0])] if outer in (list, Sequence) else outer
    return Any


def _function(dotted_path: str) -> tuple[ast.FunctionDef | None, int]:
    """Find the definition at a dotted path, and how many of its first parameters are bound already."""
    num_bound = 0
    for _ in range(_LARGEST_NUM_HOPS):
        module, _, name = dotted_path.rpartition(".")
        file = _module_file(module)
        if file is None:
            break
        target: str | ast.stmt | None = None
        for node in ast.parse(file.read_bytes()).body:
            match node:
                case ast.FunctionDef(name=found) | ast.ClassDef(name=found) if found == name:
                    target = node
                case ast.ImportFrom(module=str() as source, names=aliases, level=0 | 1 as level):
                    package = module if file.stem == "__init__" else module.rpartition(".")[0]
                    source = f"{package}.{source}" if level else source
                    for alias in aliases:
                        if (alias.asname or alias.name) == name:
                            target = f"{source}.{alias.name}"
                case ast.Assign(
                    targets=[ast.Name(id=found)],
                    value=ast.Call(func=ast.Name("partial"), args=[ast.Name(id=of), *bound]),
                ) if found == name:
                    target, num_bound = f"{module}.{of}", num_bound + len(bound)
        if isinstance(target, ast.FunctionDef):
            return target, num_bound
        if isinstance(target, ast.ClassDef):
            methods = (node for node in target.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
            return next(methods, None), num_bound + 1
        if not isinstance(target, str):
            break
        dotted_path = target
    return None, 0


def _module_file(module: str) -> Path | None:
    """Find the file of a module without importing the packages that it is in."""
    top, *parts = module.split(".")
    try:
        spec = importlib.util.find_spec(top) if top else None
    except ValueError:
        spec = None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent.joinpath(*parts) if parts or spec.submodule_search_locations else Path(spec.origin)
    candidates = [path / "__init__.py", path.with_suffix(".py")]
    return next((file for file in candidates if file.is_file()), None)
