"""Secrets: passwords, tokens and keys. They stay in the environment, for a config is copied into what a run writes."""

import re
from collections.abc import Iterator
from typing import Any

_SECRET_NAME = re.compile(r"(?i)(.*[._])?(token|secret|passw(or)?d|credentials?|((api|access|private|secret)_?)key)")
_SECRET_VARIABLE = re.compile(r"(?i).*(TOKEN|SECRET|PASSW|CREDENTIAL|KEY).*")
_PASSWORD_OF_URL = re.compile(r"(?<=://)[^/\s@]*:[^/\s@]+(?=@)")


def is_secret_name(key: str) -> bool:
    """Tell whether the values of a key, a dotted one too, are secrets by its name: `api_key`, `hf_token`."""
    return _SECRET_NAME.fullmatch(key.lstrip("-~").replace("-", "_")) is not None


def without_passwords(text: str) -> str:
    """Take the passwords out of the addresses in a text."""
    return _PASSWORD_OF_URL.sub("...", text)


def is_secret_variable(name: str) -> bool:
    """Tell whether a variable of the environment is a secret by its name: `HF_TOKEN`, `WANDB_API_KEY`."""
    return _SECRET_VARIABLE.fullmatch(name) is not None


def secret_problems(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Find secrets in a config, each by its key with a message that does not show it."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from secret_problems(value, f"{key}.{name}".removeprefix("."))
    elif isinstance(values, list):
        for value in values:
            yield from secret_problems(value, key)
    elif isinstance(values, str) and values:
        if is_secret_name(key):
            yield key, "a secret would be copied into config.yaml; give it in the environment, as export HF_TOKEN=..."
        elif _PASSWORD_OF_URL.search(values) and not re.search(r"\s", values):
            yield key, "has an address with a password in it, which would be copied into config.yaml; take it out"
