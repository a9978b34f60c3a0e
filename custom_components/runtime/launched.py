"""Processes that are started together, by torchrun, to work as one: ranks. What each sees of its place among them.

`tune run --nproc_per_node N` hands over to torchrun, which gives every process its place in environment variables and
ends all of them when one has failed. torchtune then exits with 1 whatever happened: :func:`end_as_ranks_did` is the
launcher's way out, with the exit code of the rank that failed first.

Source of the variables: torch 2.13, torch/distributed/run.py, its documentation's "Environment Variables".
"""

import atexit
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

_NOTE_VARIABLE = "LLAMA_LORA_RECIPES_NOTE"
_OPTIONS_VARIABLE = "LLAMA_LORA_RECIPES_LAUNCH_OPTIONS"
_NOTE_BYTES = 5000  # longer than any path
# Long enough for a step and a checkpoint: ranks that are not done this long after a signal are killed.
_SHUTDOWN_SECONDS = 120
EXIT_CODE_USER_ERROR = 2


@dataclass(frozen=True)
class Place:
    """The place of this process among those that were started together.

    Attributes:
        rank: from 0, over all machines.
        local_rank: from 0, on this machine.
    """

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    num_local_ranks: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def place_of_process() -> Place:
    """Read where torchrun has put this process; a process of its own is the first of one."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not {*names} <= os.environ.keys():
        return Place()
    return Place(*(int(os.environ[name]) for name in names))


def note_progress(step: int, checkpoint: Path | None) -> None:
    """Leave word for the launcher, which speaks for ranks that are killed; without one, nobody needs it.

    Args:
        step: that begins.
        checkpoint: the last whole one.
    """
    path = os.environ.get(_NOTE_VARIABLE)
    if path is not None and place_of_process().local_rank == 0:
        with Path(path).open("r+b") as file:  # note: not emptied first, a kill may come at any time
            file.write(f"{step}\n{checkpoint or ''}\n".encode().ljust(_NOTE_BYTES))


def launch_options() -> list[str]:
    """Give the options of torchrun that this process was started with, in `tune run --nproc_per_node 2 recipe.py`."""
    return json.loads(os.environ.get(_OPTIONS_VARIABLE, "[]"))


def prepare_launcher(options: Sequence[str]) -> None:
    """Let this process, about to become torchrun, end as its ranks did, and give them time to save after a signal.

    Args:
        options: see :func:`launch_options`.
    """
    os.environ[_OPTIONS_VARIABLE] = json.dumps(options)
    descriptor, path = tempfile.mkstemp(prefix="llama-lora-recipes-")
    os.close(descriptor)
    atexit.register(Path(path).unlink, missing_ok=True)
    os.environ[_NOTE_VARIABLE] = path
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SHUTDOWN_SECONDS))
    # SLURM's `--signal=USR1@120` reaches the launcher, too.
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    # What they say of a rank that ended is that it ended.
    for name in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").disabled = True
    sys.excepthook = end_as_ranks_did


def end_as_ranks_did(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Exit with the code of the rank that failed first, as `sys.excepthook` of the launcher.

    A rank that ended by itself has said why; of one that a signal ended, this says where its run is.
    """
    if kind.__name__ == "SignalException":  # torch's: the launcher got it, and passed it on to the ranks
        _leave(128 + error.sigval)  # type: ignore[attr-defined]
    if kind.__name__ != "ChildFailedError":
        sys.__excepthook__(kind, error, traceback)
        return
    rank, failure = _first_failure(error.failures)  # type: ignore[attr-defined]
    if failure.exitcode >= 0:
        _leave(failure.exitcode)
    print(_words_of_killed(rank, signal.Signals(-failure.exitcode)), file=sys.stderr)
    _leave(128 - failure.exitcode)


def _first_failure(failures: Mapping[int, Any]) -> tuple[int, Any]:
    """Find the rank that failed first. torch knows the second of it only: where one was killed, others fail with it."""

    def order(rank: int) -> tuple[int, float]:
        # A rank that has said why is the reason, whatever became of those that did not answer it; then one that was
        # killed. The launcher ends all others by SIGTERM.
        code = failures[rank].exitcode
        was_killed = code < 0 and code != -signal.SIGTERM
        kinds = (code == EXIT_CODE_USER_ERROR, was_killed, code > 0, True)
        return kinds.index(True), failures[rank].timestamp

    rank = min(failures, key=order)
    return rank, failures[rank]


def _words_of_killed(rank: int, number: signal.Signals) -> str:
    step, checkpoint = [*Path(os.environ[_NOTE_VARIABLE]).read_text(encoding="utf-8").split("\n"), "", ""][:2]
    where = f"in step {step}" if step else "before the first step"
    hint = ", as the system does when memory runs out" if number == signal.SIGKILL else ""
    return f"error: rank {rank} was ended by {number.name} {where}{hint}; {way_on(checkpoint)}"


def way_on(checkpoint: Path | str | None) -> str:
    """Say how to go on with a run that has lost a rank.

    Args:
        checkpoint: the last whole one.
    """
    if not checkpoint:
        return "there is no checkpoint yet"
    return f"the last whole checkpoint is {checkpoint}: go on from it with resume_from_checkpoint=true"


def _leave(exit_code: int) -> None:
    Path(os.environ[_NOTE_VARIABLE]).unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
