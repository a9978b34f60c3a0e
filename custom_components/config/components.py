"""torchtune's idiom for config nodes: `_component_` names a callable, the other keys are its arguments."""

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any

from custom_components.runtime.quiet_bitsandbytes import import_bitsandbytes

# Whose code a config may name. Anyone else's runs only where the command says so: a config may be a stranger's.
_KNOWN = ("custom_components.", "torch.optim.", "torchtune.", "torchao.optim.", "bitsandbytes.optim.")
_trusted: set[str] = set()


def trust_packages(names: Iterable[str]) -> None:
    """Let configs name the code of these packages, and of no others that were trusted before."""
    _trusted.clear()
    _trusted.update(names)


def is_trusted(dotted_path: str) -> bool:
    """Tell whether a config may name a path; nothing is imported for the answer."""
    return dotted_path.startswith(_KNOWN) or dotted_path.partition(".")[0] in _trusted


def component(dotted_path: str) -> Callable[..., Any]:
    """Import the callable at `package.module.name`.

    Raises:
        ImportError, AttributeError: if there is none, or it is of a package that is not trusted.
    """
    if not is_trusted(dotted_path):
        package = dotted_path.partition(".")[0]
        raise ImportError(f"it is not imported without --trust-components {package}")
    module_name, _, name = dotted_path.rpartition(".")
    if module_name.partition(".")[0] == "bitsandbytes":
        import_bitsandbytes()
    return getattr(importlib.import_module(module_name), name)


def bound(node: dict[str, Any]) -> Callable[..., Any]:
    """Give a node's `_component_` with the node's other keys filled in, for the recipe to call with what it adds."""
    keys = {key: value for key, value in node.items() if key != "_component_"}
    return functools.partial(component(node["_component_"]), **keys)


def instantiate(node: dict[str, Any], *arguments: Any, **keyword_arguments: Any) -> Any:
    """Call a node's `_component_` with the node's other keys and the live objects that the recipe adds.

    Unlike `torchtune.config.instantiate` this does not copy the live objects.
    """
    return bound(node)(*arguments, **keyword_arguments)
