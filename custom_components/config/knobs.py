"""Top-level knobs that nodes pass on, and keys of which one replaces another.

A config has `lora_rank: 16` and in the node `model` `lora_rank: ${lora_rank}`, so that `lora_rank=32` is enough. A
config that a run wrote has no such references any more: here they are put back.
"""

import math
from collections.abc import Sequence
from typing import Any

from custom_components.config.overrides import RawConfig
from custom_components.config.settings import Settings
from custom_components.runtime.errors import UserError
from custom_components.runtime.terminal import say

# Keys of nodes that pass on a knob of another name.
_KNOBS_OF_OTHER_NAMES = {("optimizer", "lr"): "learning_rate"}


def link_knobs(values: dict[str, Any]) -> None:
    """Write `${knob}` for each key of a node that has the value of its knob, in place."""
    for name, node in values.items():
        for key, value in node.items() if isinstance(node, dict) else ():
            knob = _KNOBS_OF_OTHER_NAMES.get((name, key), key)
            if knob in values and type(values[knob]) is type(value) and values[knob] == value:
                node[key] = f"${{{knob}}}"
    tokenizer, checkpoint_dir = values.get("tokenizer"), values.get("checkpoint_dir")
    for end in ("", "/tokenizer.model"):
        if isinstance(tokenizer, dict) and tokenizer.get("path") == f"{checkpoint_dir}{end}":
            tokenizer["path"] = f"${{checkpoint_dir}}{end}"


def settle_overrides(raw: RawConfig, typed_keys: Sequence[str], settings_type: type[Settings]) -> None:
    """Let what was typed on the command line win over what is only in the file, in place. What gives way is said.

    Args:
        typed_keys: dotted.

    Raises:
        UserError: a knob was typed that reaches no node, because the nodes have values of their own.
    """
    _settle_alternatives(raw, {key.partition(".")[0] for key in typed_keys}, settings_type)
    for (name, key), knob in _KNOBS_OF_OTHER_NAMES.items():
        node = raw.values.get(name)
        if knob not in settings_type.model_fields or not isinstance(node, dict) or key not in node:
            continue
        is_key_typed = bool({name, f"{name}.{key}"} & {*typed_keys})
        if knob in typed_keys:
            node[key] = node[key] if is_key_typed else f"${{{knob}}}"
        elif _is_rate(node[key]) and (is_key_typed or raw.values.get(knob) is None):
            raw.values[knob] = node[key]
    not_reached = [_not_reached(raw, key, typed_keys) for key in typed_keys if key in settings_type.model_fields]
    if problems := [problem for problem in not_reached if problem]:
        raise UserError(*problems)


def _is_rate(value: Any) -> bool:
    """Any other value is refused as the node's, once."""
    return type(value) in (int, float) and 0 < value < math.inf


def _settle_alternatives(raw: RawConfig, typed: set[str], settings_type: type[Settings]) -> None:
    for pair in settings_type.alternatives:
        defaults = {key: settings_type.model_fields[key].get_default() for key in pair}
        values = {key: raw.values.get(key, defaults[key]) for key in pair}
        for given, other in (pair, pair[::-1]):
            if given in typed and other not in typed and all(values[key] != defaults[key] for key in pair):
                said = "its node" if isinstance(values[other], dict) else repr(values[other])
                say(f"{given} on the command line replaces {other}, {said} ({raw.origin(other)})")
                raw.values[other] = defaults[other]


def _not_reached(raw: RawConfig, knob: str, typed_keys: Sequence[str]) -> str | None:
    """A message if each node that has a key of the knob's name has a value of its own in it, and all from the file."""
    own = {f"{name}.{knob}": node[knob] for name, node in raw.values.items() if isinstance(node, dict) and knob in node}
    is_reached = any(_refers(value, knob) or {key, key.partition(".")[0]} & {*typed_keys} for key, value in own.items())
    if knob not in raw.values or not own or is_reached or raw.values[knob] in own.values():
        return None
    places = ", ".join(f"{key}, which is {value!r} ({raw.origin(key)})" for key, value in own.items())
    return f"{knob}: {raw.values[knob]!r} does not reach {places}; write ${{{knob}}} there, or set that key"


def _refers(value: Any, knob: str) -> bool:
    return isinstance(value, str) and f"${{{knob}}}" in value
