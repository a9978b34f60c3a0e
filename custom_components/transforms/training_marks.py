"""Marks in the data that say whether a message, or a whole row, is trained on.

The spellings are those of OpenAI's fine-tuning format and Mistral's (`weight`), Axolotl (`train`, `training`),
LLaMA-Factory (`loss_weight`), ms-swift (`loss`, `loss_scale`), GLM-4 (`loss_mask`) and torchtune (`masked`).
"""

import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any

# A key that contains one of these is never metadata: it is honoured, or an error.
_IS_MARK = re.compile("train|loss|weight|mask", re.IGNORECASE)
_SEPARATORS = re.compile(r"[\W_]+")
# Without separators and in lower case, so that lossWeight and loss-weight are loss_weight.
_TRUE_TRAINS = {
    *("weight", "train", "training", "trainable", "trained", "istrain", "istrainable", "istrained", "dotrain"),
    *("shouldtrain", "trainweight", "trainingweight", "loss", "lossweight", "lossscale", "lossmask", "isloss"),
    *("hasloss", "useloss", "computeloss", "calculateloss", "calcloss"),
}
_TRUE_MASKS = {"mask", "masked", "ismasked", "maskedout", "maskout", "ignoreloss", "skiploss", "noloss", "notrain"}
_TRUTHS = {"true": True, "yes": True, "1": True, "1.0": True, "false": False, "no": False, "0": False, "0.0": False}


def mark_keys(keys: Iterable[Any]) -> list[Any]:
    """Find the keys that say, by their name, what is trained."""
    return [key for key in keys if _IS_MARK.search(str(key))]


def marked_as_trained(values: Mapping[Any, Any], keys: Collection[Any], name: str) -> bool | None:
    """Read whether marks say that a message or row is trained on; None: they say nothing.

    Args:
        keys: those of :func:`mark_keys`.
        name: what the message or row is called in an error.

    Raises:
        ValueError: an unknown mark, a value other than 0 and 1 or false and true, or marks that contradict each other.
    """
    found: dict[Any, bool] = {}
    for key in keys:
        if not is_blank(values[key]):
            true_trains = _true_trains(str(key))
            if true_trains is None:
                raise ValueError(
                    f"{name} has {key!r}, which may say what is trained and is not known here; "
                    "say it with 'train': true or false, else rename or delete the key"
                )
            found[key] = _truth(key, values[key], name) == true_trains
    if len(set(found.values())) > 1:
        marks = ", ".join(f"{key!r}: {values[key]!r}" for key in found)
        raise ValueError(f"{name} has marks that contradict each other, {marks}")
    return next(iter(found.values()), None)


def names_of(keys: Iterable[Any]) -> str:
    """Write keys for an error."""
    return " and ".join(repr(key) for key in keys)


def is_blank(value: Any) -> bool:
    """Whether a value says nothing: null, no text, an empty list or object."""
    return value is None or (isinstance(value, str) and not value.strip()) or (value in ([], {}, ()))


def is_empty(value: Any) -> bool:
    """Whether a value is blank, or text that spells a blank one, as `"[]"` in LLaMA-Factory's column of tools."""
    return is_blank(value) or (isinstance(value, str) and value.strip() in ("[]", "{}", "null"))


@cache
def _true_trains(key: str) -> bool | None:
    """Whether the key's true means that something is trained; None: the key is not known."""
    plain = _SEPARATORS.sub("", key).lower()
    return True if plain in _TRUE_TRAINS else False if plain in _TRUE_MASKS else None


def _truth(key: Any, value: Any, name: str) -> bool:
    if isinstance(value, str):
        truth = _TRUTHS.get(value.strip().lower())
    elif isinstance(value, bool | int | float) and value in (0, 1):
        truth = bool(value)
    else:
        truth = None
    if truth is not None:
        return truth
    if isinstance(value, int | float) and 0 < value < 1:
        raise ValueError(
            f"{name} has {key!r}: {value!r}; an answer is trained whole or not at all, so the mark has to be 0 or 1"
        )
    raise ValueError(f"{name} has {key!r}: {str(value)[:40]!r}, which is neither 0 nor 1, false nor true")
