"""Hints for unknown keys: our name for another tool's key, or the nearest name for a typo."""

import re
from collections.abc import Sequence

from custom_components.config.foreign_names import FOREIGN_KEYS
from custom_components.runtime.validation import nearest_name


def key_hint(key: str, known_keys: Sequence[str]) -> str:
    """Give `; here it is 'lora_rank'` for `lora_r`, `; did you mean 'lora_rank'?` for `lora_rnak`, or nothing.

    Args:
        key: dotted, with the indices of lists, such as `dataset.source[1].wieght`.
        known_keys: the keys that may be set, in the same form. Of equally near ones the first counts.
    """
    return _foreign_hint(key, known_keys) or nearest_key(key, known_keys)


def nearest_key(key: str, known_keys: Sequence[str]) -> str:
    """Give `; did you mean 'lora_rank'?`, or nothing where no known key is near."""
    node, _, name = key.rpartition(".")
    siblings = {known.rpartition(".")[2]: known for known in known_keys if known.rpartition(".")[0] == node}
    elsewhere = {known.rpartition(".")[2]: known for known in reversed(known_keys)}
    if name in elsewhere:
        near = elsewhere[name]
    elif (near_name := nearest_name(name, siblings)) is not None:
        near = siblings[near_name]
    elif (near_name := nearest_name(name, elsewhere)) is not None:
        near = elsewhere[near_name]
    else:
        return ""
    return f"; did you mean {near!r}?"


def _foreign_hint(key: str, known_keys: Sequence[str]) -> str:
    parent, _, name = key.rpartition(".")
    node = re.split(r"[.\[]", parent)[0]
    table_node = "dataset" if node == "dataset_val" else node
    for answer in [*FOREIGN_KEYS.get(f"{table_node}.{name}", []), *FOREIGN_KEYS.get(name, [])]:
        if answer.key is None:
            return f"; delete it: {answer.note}"
        # An answer of the table for `dataset` is also one for `dataset_val`, and for an entry of a list of sources.
        beside = f"{parent}.{answer.key.rpartition('.')[2]}"
        for ours in (beside, answer.key) if answer.key.startswith(f"{table_node}.") else (answer.key,):
            if ours in known_keys:
                return f"; here it is {ours!r}" + (f": {answer.note}" if answer.note else "")
    return ""
