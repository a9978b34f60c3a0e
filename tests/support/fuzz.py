"""Damaged inputs by the thousand: each is refused in one clear line, or read as what it is, in time.

python -m tests.support.fuzz --seed 0 --count 10000
"""

import argparse
import contextlib
import io
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from custom_components.runtime.errors import UserError
from tests.support.fuzz_damage import damage_bytes, damage_place, damage_values
from tests.support.fuzz_kinds import KINDS, Kind, drawn_kind

LIMIT_SECONDS = 10  # of one input
_BATCH = 200  # inputs of one process
_MOST_CHARACTERS = 700  # of an error


@dataclass(frozen=True)
class Outcome:
    """What came of an input: "accepted", "error", or what must not be: "traceback", "unclear", "changed", "hang"."""

    number: int
    kind: str
    what: str
    words: str = ""


class Fuzz:
    """Makes inputs of a seed, each by its number, and tries them.

    Args:
        folder: for the files; those that are right are made once for each kind, when it is first tried.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self._right: dict[str, str] = {}

    def outcome(self, number: int) -> Outcome:
        chance = random.Random(f"{self.seed} {number}")
        kind = drawn_kind(chance)
        base = self._base(kind)
        folder = self.folder / "input"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder, symlinks=True)
        damaged = self._damage(kind, folder, chance)
        return self._tried(number, kind, folder, damaged)

    def _base(self, kind: Kind) -> Path:
        base = self.folder / kind.name
        if kind.name not in self._right:
            if not base.exists():
                # Made where it is used: what a cache keeps, it keeps by paths.
                folder = self.folder / "input"
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                kind.make(folder)
                folder.rename(base)
            folder = self.folder / "input"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(base, folder)
            with _quiet():
                self._right[kind.name] = kind.use(folder)
        return base

    def _damage(self, kind: Kind, folder: Path, chance: random.Random) -> str:
        files = sorted(file for pattern in kind.files for file in folder.glob(pattern) if file.is_file())
        file = chance.choice(files)
        content = file.read_bytes()
        way = chance.random()
        if way < 0.08:
            damage_place(file, chance)
        elif way < 0.6 and file.suffix in (".json", ".yaml"):
            file.write_bytes(damage_values(content, chance, is_yaml=file.suffix == ".yaml"))
        else:
            file.write_bytes(damage_bytes(content, chance))
        return str(file.relative_to(folder))

    def _tried(self, number: int, kind: Kind, folder: Path, damaged: str) -> Outcome:
        here = Path.cwd()
        place = f"{kind.name}, {damaged}: "
        try:
            with _quiet(), time_limit(LIMIT_SECONDS):
                found = kind.use(folder)
        except UserError as error:
            unclear = [text for text in error.messages if "\n" in text or len(text) > _MOST_CHARACTERS]
            return Outcome(number, kind.name, "unclear" if unclear else "error", place + str(error)[:300])
        except _TooLong:
            return Outcome(number, kind.name, "hang", place + traceback.format_exc()[-600:])
        except KeyboardInterrupt:
            raise
        except BaseException:
            return Outcome(number, kind.name, "traceback", place + traceback.format_exc()[-900:])
        if Path("hit").exists() or (here / "hit").exists():
            return Outcome(number, kind.name, "changed", f"{place}code ran")
        is_older = kind.name == "run checkpoint" and not found.startswith("4 ")
        if kind.is_checked and not is_older and found != self._right[kind.name]:
            return Outcome(number, kind.name, "changed", place)
        return Outcome(number, kind.name, "accepted")


class _TooLong(BaseException):
    """No Exception, which what is tried may catch."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise _TooLong where the block takes longer: seconds of a processor, for others may be busy."""

    def stop(*_: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def in_forks(folder: Path, seed: int, numbers: range, report: Callable[[Outcome], None]) -> None:
    """Try inputs in forked processes; one that dies or waits costs its input only."""
    start = numbers.start
    while start < numbers.stop:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _try_batch(folder, seed, range(start, min(start + _BATCH, numbers.stop)), writing)
        os.close(writing)
        start = _collected(pid, reading, start, report)


def _try_batch(folder: Path, seed: int, numbers: range, writing: int) -> None:
    """Try inputs and write each outcome as a line; the process then ends."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)  # libraries of C and Rust write there
    fuzz = Fuzz(folder, seed)
    for number in numbers:
        outcome = fuzz.outcome(number)
        fields = (str(outcome.number), outcome.kind, outcome.what, outcome.words.encode("utf-8", "replace").hex())
        os.write(writing, ("\t".join(fields) + "\n").encode())
    os._exit(0)


def _collected(pid: int, reading: int, start: int, report: Callable[[Outcome], None]) -> int:
    """Report what a process writes until it ends; return the number of the input after the last."""
    with os.fdopen(reading, "rb", buffering=0) as lines:
        while True:
            is_ready = select.select([lines], [], [], 20 * LIMIT_SECONDS)[0]
            line = lines.readline() if is_ready else b""
            if not line:
                break
            number, kind, what, words = line.decode().rstrip("\n").split("\t")
            report(Outcome(int(number), kind, what, bytes.fromhex(words).decode()))
            start = int(number) + 1
    if not is_ready:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != 0:
        report(Outcome(start, "", "hang" if not is_ready else "traceback", f"the process ended with {status}"))
        start += 1
    return start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--start", type=int, default=0, help="the first input, to go on where a run was stopped")
    options = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    begin = time.monotonic()

    def report(outcome: Outcome) -> None:
        counts[outcome.kind, outcome.what] += 1
        if outcome.what not in ("accepted", "error"):
            print(f"input {outcome.number}: {outcome.what}: {outcome.words}", flush=True)
        if outcome.number % 1000 == 999:
            print(f"{outcome.number + 1} inputs, {time.monotonic() - begin:.0f} s", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_TOKEN"] = "hf_the_secret"
        in_forks(Path(folder), options.seed, range(options.start, options.start + options.count), report)
    whats = ("accepted", "error", "unclear", "traceback", "hang", "changed")
    print(f"seed {options.seed}\n{'kind':<24}{'tried':>8}" + "".join(f"{what:>10}" for what in whats))
    for name in [*(kind.name for kind in KINDS), ""]:
        row = [counts[name, what] for what in whats]
        if sum(row):
            print(f"{name:<24}{sum(row):>8}" + "".join(f"{number:>10}" for number in row))
    totals = [sum(number for (_, found), number in counts.items() if found == what) for what in whats]
    print(f"{'all':<24}{sum(totals):>8}" + "".join(f"{number:>10}" for number in totals))
    return int(any(totals[2:]))


if __name__ == "__main__":
    sys.exit(main())
