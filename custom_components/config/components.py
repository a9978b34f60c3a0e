"""torchtune's idiom for config nodes: `_component_` names a callable, the other keys are its arguments."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from custom_components.runtime.quiet_bitsandbytes import import_bitsandbytes


def component(dotted_path: str) -> Callable[..., Any]:
    """Import the callable at `package.module.name`.

    Raises:
        ImportError, AttributeError: if there is none.
    """
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
