"""Ways to damage a file: its bytes, the values in it, or what is at its place."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

# What a person, a program or a disk may leave where another value is due.
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 1.5, -0.5, 10**9, 10**18, 10**30, -(10**30), 1e308, 5e-324),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        " ",
        "32000",
        "a",
        "None",
        "null",
        "~",
        "~nosuchuser/x",
        "../..",
        "/",
    ),
    *("${5", "${nothing}", "${seed}", "${oc.env:HF_TOKEN}", "é漢🙂", "a\nb", "\x1b[2J", "x" * 5000, "9" * 5000),
    *("(a+)+$", "(.*)*b", "[", "(?P<a>.)(?P=a)", ".*", "os.system", "os.getcwd", "subprocess.Popen", "builtins.print"),
    *([], [[]], [None], [1], ["a"], [-1, 10**9], {}, {"a": {}}, {"_component_": "os.system", "command": "touch hit"}),
    [list(range(300))],
]
TEXTS = [
    *('"\\ud83d"', "1" * 4300, "[" * 3000, '{"a":' * 3000, "!!set {a, b}", "!!timestamp 2020-01-01", "!!binary aGk="),
    *(
        "&a [*a]",
        "&a {b: *a}",
        "!!python/object/apply:os.system ['touch hit']",
        "NaN",
        "-Infinity",
        "\0",
        "\ufeff",
        "- - - -",
    ),
    "&a0 [x,x,x,x,x,x,x,x,x]\n" + "\n".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)),
]


def damage_bytes(content: bytes, chance: random.Random) -> bytes:
    """Flip bits, cut, fill with zeros or noise, repeat, or replace the whole."""
    place = chance.randrange(len(content)) if content else 0
    kind = chance.randrange(9)
    if kind <= 2:
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 1, 1, 2, 8]) if content else 0):
            damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        return bytes(damaged)
    if kind == 3:
        return content[:place]
    if kind == 4:
        length = chance.choice([1, 8, 512, 4096])
        return content[:place] + bytes(length) + content[place + length :]
    if kind == 5:
        noise = chance.randbytes(chance.choice([1, 4, 64]))
        return content[:place] + noise + content[place + chance.choice([0, len(noise)]) :]
    if kind == 6:
        return chance.choice([content * 2, content[place:], content[place:] + content[:place], content[::-1]])
    if kind == 7:
        return chance.choice(TEXTS).encode("utf-8", "surrogatepass")
    return chance.choice(
        [b"", b"\n", b"null", b"[]", b"{}", b"\xff\xfe", bytes(100), chance.randbytes(300), b"PK\3\4", b"\x1f\x8b\x08"]
    )


def damage_values(content: bytes, chance: random.Random, *, is_yaml: bool) -> bytes:
    """Put another value in the place of one, at any depth; or take one away, or add one."""
    values = yaml.safe_load(content) if is_yaml else json.loads(content)
    for _ in range(chance.choice([1, 1, 1, 2])):
        holder, key = _place(values, chance)
        kind = chance.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[chance.choice(["more", "r", "_component_", "<<", "0", *map(str, holder)])] = chance.choice(VALUES)
        else:
            holder[key] = chance.choice(VALUES)
        if not values:
            break
    if not is_yaml:
        return json.dumps(values, ensure_ascii=chance.random() < 0.5).encode()
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if chance.random() < 0.15:
        lines = text.splitlines()
        place = chance.randrange(len(lines))
        lines[place] = f"{lines[place].partition(':')[0]}: {chance.choice(TEXTS)}"
        text = "\n".join(lines)
    return text.encode("utf-8", "surrogatepass")


def _place(values: Any, chance: random.Random) -> tuple[Any, Any]:
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in items:
            places.append((value, key))
            if len(places) < 3000:
                collect(item)

    collect(values)
    return chance.choice(places) if places else ({"a": 1}, "a")


def damage_place(path: Path, chance: random.Random) -> None:
    """Put something else in the place of a file: nothing, a folder, a pipe, a link, a file of a terabyte."""
    kinds: list[Callable[[], object]] = [
        lambda: None,
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("nowhere"),
        lambda: path.symlink_to("/dev/null"),
        lambda: path.symlink_to(".."),
        lambda: _write_sparse(path),
    ]
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    chance.choice(kinds)()


def _write_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**38)
