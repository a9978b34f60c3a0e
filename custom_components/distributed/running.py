"""The way into a recipe on several ranks, and the ways out of it: one line for an error, one exit code for all."""

import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import NoReturn

import torch.distributed as dist

from custom_components.distributed.ranks import ALONE, AgreedError, LostRankError, Ranks
from custom_components.runtime.errors import EXIT_CODE_USER_ERROR, UserError, print_errors, run_recipe
from custom_components.runtime.launched import place_of_process, way_on
from custom_components.runtime.stopping import STOP_SIGNALS, StopRequest

# A launcher that sees a rank end, ends the others within this time.
_LAUNCHER_SECONDS = 3.0
_ROLL_CALL_SECONDS = 2.0
_SAID_SECONDS = 4.0
_JOINING_SECONDS = 300


def run_on_ranks(recipe_main: Callable[[Ranks], None]) -> None:
    """Run a recipe's main function on every rank and exit as :func:`run_recipe` does, with one code and one line."""
    run_recipe(partial(_run, recipe_main), is_for_ranks=True)


@contextlib.contextmanager
def ended_by(stop: StopRequest) -> Iterator[None]:
    """In the block, take a lost rank for what it is after a signal: the launcher is ending all of them.

    Raises:
        SystemExit: with the signal's exit code.
    """
    try:
        yield
    except LostRankError:
        if stop.signal_number is None:
            raise
        sys.exit(128 + stop.signal_number)


def _run(recipe_main: Callable[[Ranks], None]) -> None:
    place = place_of_process()
    if place.num_ranks == 1:
        recipe_main(ALONE)
        return
    if not place.is_first:
        _fall_silent()
    rendezvous = dist.rendezvous("env://", timeout=timedelta(seconds=_JOINING_SECONDS))
    store, _, _ = next(iter(rendezvous))
    ranks = Ranks(place, store)
    try:
        recipe_main(ranks)
    except UserError as error:
        _leave(ranks, error)
    except LostRankError as error:
        _leave_lost(ranks, error)
    finally:
        # note: a process that ends with its group aborts.
        if dist.is_initialized():
            dist.destroy_process_group()


def _fall_silent() -> None:
    """Print nothing but tracebacks: what there is to say, the first rank says. Bars of libraries need a terminal."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123  for the rest of the process
    sys.stderr = _NoTerminal(os.fdopen(os.dup(2), "wb", buffering=0), encoding="utf-8", write_through=True)


class _NoTerminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return False


def _leave(ranks: Ranks, error: UserError) -> NoReturn:
    """Print the error on one rank, and exit with the code for it on all."""
    _ignore_launcher()
    with contextlib.suppress(RuntimeError):  # the store may have gone with another rank
        if isinstance(error, AgreedError):
            # note: the launcher ends all when one has ended, and the first may not have printed it yet; or be in a
            # collective, and know nothing of it.
            if ranks.is_first or not _is_said_by_first(ranks):
                print_errors(error)
                ranks.say()
        elif ranks.claims(error.messages):
            whose = "" if ranks.is_first else f"rank {ranks.place.rank}: "
            print_errors(UserError(*(whose + message for message in error.messages)))
            ranks.say()
    _exit(ranks)


def _leave_lost(ranks: Ranks, error: LostRankError) -> NoReturn:
    """Exit after another rank has; where neither it nor the launcher has said why, say which one it was."""
    end_seconds = time.monotonic() + _LAUNCHER_SECONDS
    with contextlib.suppress(RuntimeError):
        while time.monotonic() < end_seconds and not ranks.has_failed():
            time.sleep(0.05)  # a signal of the launcher ends it here
        _ignore_launcher()
        if not ranks.has_failed():
            ranks.leave_word("present")
            lost = ranks.ranks_without("present", _ROLL_CALL_SECONDS)
            where = f"step {ranks.step}" if ranks.step else "before the first step"
            which = f"rank {', '.join(map(str, lost))}" if lost else "a rank"
            what = f"{which} has ended"
            if "timed out" in str(error).lower():
                what = f"no answer from {which} within collective_timeout_seconds {ranks.timeout_seconds:g}"
            message = f"{where}: {what}; {way_on(ranks.checkpoint)}"
            if ranks.claims((message,)):
                print_errors(UserError(message))
    _exit(ranks)


def _exit(ranks: Ranks) -> NoReturn:
    """Exit at once: a process group that has lost a rank may wait for it when it is taken down."""
    if ranks.is_first:
        # Without torchrun's agent this process keeps the store, which the others still read.
        with contextlib.suppress(RuntimeError):
            ranks.leave_word("gone")
            if "TORCHELASTIC_RUN_ID" not in os.environ:
                ranks.ranks_without("gone", _LAUNCHER_SECONDS)
    else:
        with contextlib.suppress(RuntimeError):
            ranks.leave_word("gone")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_CODE_USER_ERROR)


def _is_said_by_first(ranks: Ranks) -> bool:
    end_seconds = time.monotonic() + _SAID_SECONDS
    while time.monotonic() < end_seconds and not ranks.is_said():
        time.sleep(0.02)
    return ranks.is_said()


def _ignore_launcher() -> None:
    """Do not let the launcher, which ends all ranks when one has ended, end this one before it has said why."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
