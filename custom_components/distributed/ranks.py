"""The ranks of a run: processes that train one model together, each on its device, with equal weights.

They talk in two ways. What is said in words, errors and digests, goes through torch's store, a table of keys that
torchrun's agent keeps: it works before the process group begins, and while a rank is busy or dead. Numbers of a step
go through collectives of the process group.
"""

import contextlib
import json
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from custom_components.runtime.errors import UserError
from custom_components.runtime.launched import Place, note_progress
from custom_components.runtime.stopping import STOP_SIGNALS

_POLL_SECONDS = 0.02
# Before the config is read, which says how long.
_FIRST_TIMEOUT_SECONDS = 1800.0
# The key under which the first rank that fails leaves its messages.
_FAILED = "failed"
_SAID = "said"

Result = TypeVar("Result")


class AgreedError(UserError):
    """A problem of one rank that all of them know of: the first rank is to print it."""


class LostRankError(RuntimeError):
    """Another rank has ended, or did not answer in time."""


class Ranks:
    """The ranks of a run, seen from one of them.

    Args:
        place: of this process.
        store: None: it is alone.
    """

    def __init__(self, place: Place, store: dist.Store | None = None) -> None:
        self.place = place
        self._store = store
        self._timeout_seconds = _FIRST_TIMEOUT_SECONDS
        self._num_messages = 0
        self.step = 0
        self.checkpoint: Path | None = None

    @property
    def num(self) -> int:
        return self.place.num_ranks

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that prints, and writes files."""
        return self.place.is_first

    @property
    def answered_signals(self) -> Collection[int]:
        """The signals on which this rank says that the run stops: the launcher ends ranks by SIGTERM, too."""
        if self.num == 1:
            return STOP_SIGNALS
        return [signal.SIGINT] if self.is_first else []

    @property
    def timeout_seconds(self) -> float:
        return self._timeout_seconds

    def device_name(self, name: str) -> str:
        """Give the device that the `device` key names on this rank: of several cards, that of its local rank.

        Raises:
            UserError: there are fewer cards than ranks on this machine, or the key names one card for all.
        """
        num_local, num_cards = self.place.num_local_ranks, torch.cuda.device_count()
        if self.num == 1 or name == "cpu" or (name == "auto" and num_cards == 0):
            return name
        if num_local > 1 and name not in ("auto", "cuda"):
            raise UserError(f"device: {name!r} names one card for {num_local} processes; use device=auto")
        if num_local > max(1, num_cards):
            raise UserError(
                f"device: {num_local} processes were started on a machine with {num_cards} CUDA devices; start "
                f"{num_cards} with --nproc_per_node, or train on the CPU with device=cpu"
            )
        return f"cuda:{self.place.local_rank}"

    def begin(self, timeout_seconds: float, device_name: str) -> None:
        """Begin the process group: gloo for numbers of the host, NCCL for those of a card.

        Args:
            timeout_seconds: after which a collective that not all ranks take part in is an error.
            device_name: what :meth:`device_name` gave.
        """
        self._timeout_seconds = timeout_seconds
        if self._store is None:
            return
        with self.losses_named():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device_name.startswith("cuda") else "gloo",
                store=dist.PrefixStore("group", self._store),
                rank=self.place.rank,
                world_size=self.num,
                timeout=timedelta(seconds=timeout_seconds),
            )

    def begin_step(self, number: int, checkpoint: Path | None) -> None:
        """Remember where the run is, for the words of an error.

        Args:
            number: of the step that begins.
            checkpoint: the last whole one.
        """
        self.step, self.checkpoint = number, checkpoint
        if self._store is not None:
            note_progress(number, checkpoint)

    def agree(self, do: Callable[[], Result], *, in_turn: bool = False) -> Result:
        """Do something on every rank, and go on when all of them have.

        Args:
            in_turn: the first rank of a machine is done before its others begin: they find what it has kept on disk.

        Raises:
            AgreedError: it was a :class:`UserError` on one of them.
        """
        if self._store is None:
            return do()
        key = self._next_key()
        if in_turn and self.place.local_rank > 0:
            self._waited_for(f"{key}/{self.place.rank - self.place.local_rank}")
        try:
            result = do()
        except UserError as error:
            raise self._agreed_error(error) from None
        except SystemExit:
            self._store.set(f"{key}/{self.place.rank}", "")  # all of them leave
            raise
        self._store.set(f"{key}/{self.place.rank}", "")
        for rank in range(self.num):
            self._waited_for(f"{key}/{rank}")
        return result

    def gathered(self, value: Any) -> list[Any]:
        """Give the values of all ranks, in their order.

        Args:
            value: of what JSON has.
        """
        if self._store is None:
            return [value]
        key = self._next_key()
        self._store.set(f"{key}/{self.place.rank}", json.dumps(value))
        return [json.loads(self._waited_for(f"{key}/{rank}")) for rank in range(self.num)]

    def check_same(self, values: Mapping[str, str]) -> None:
        """Check that all ranks have the same.

        Args:
            values: by what they are, in words, `the config` for example.

        Raises:
            AgreedError: two ranks have different values.
        """
        first, *others = self.gathered(dict(values))
        for rank, other in enumerate(others, 1):
            if names := [name for name in values if other[name] != first[name]]:
                raise AgreedError(
                    f"{' and '.join(names)}: rank {rank} has another than rank 0 ({other[names[0]]}, not "
                    f"{first[names[0]]}); give all processes the same files and arguments"
                )

    def summed(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self._store is not None:
            with self.losses_named():
                dist.all_reduce(tensor)
        return tensor

    def summed_numbers(self, *numbers: int) -> list[int]:
        """Sum whole numbers over all ranks."""
        return self.summed(torch.tensor(numbers)).tolist()

    def largest(self, number: int) -> int:
        """Give the largest of all ranks' numbers."""
        if self._store is None:
            return number
        tensor = torch.tensor(number)
        with self.losses_named():
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor.item())

    def claims(self, messages: tuple[str, ...]) -> bool:
        """Tell the others why this rank ends; return whether it is the first of them to end."""
        assert self._store is not None
        claim = json.dumps([self.place.rank, *messages])
        return self._store.compare_set(_FAILED, "", claim).decode() == claim

    def has_failed(self) -> bool:
        """Say whether a rank has said why it ends."""
        assert self._store is not None
        return self._store.check([_FAILED])

    def say(self) -> None:
        """Tell the others that the reason is printed."""
        assert self._store is not None
        self._store.set(_SAID, "")

    def is_said(self) -> bool:
        assert self._store is not None
        return self._store.check([_SAID])

    def leave_word(self, word: str) -> None:
        """Say something of this rank, which :meth:`ranks_without` reads."""
        assert self._store is not None
        self._store.set(f"{word}/{self.place.rank}", "")

    def ranks_without(self, word: str, seconds: float) -> list[int]:
        """List the ranks that have not left a word, waiting so long for them."""
        assert self._store is not None
        end_seconds = time.monotonic() + seconds
        while True:
            missing = [rank for rank in range(self.num) if not self._store.check([f"{word}/{rank}"])]
            if not missing or time.monotonic() > end_seconds:
                return missing
            time.sleep(_POLL_SECONDS)

    def _next_key(self) -> str:
        self._num_messages += 1
        return f"message {self._num_messages}"

    def _waited_for(self, key: str) -> bytes:
        """Wait for what another rank says.

        Raises:
            AgreedError: a rank has failed instead.
            LostRankError: nothing came in time.
        """
        assert self._store is not None
        end_seconds = time.monotonic() + self._timeout_seconds
        with self.losses_named():
            # note: not the store's own waiting, in which no signal is seen.
            while not self._store.check([key]):
                if self._store.check([_FAILED]):
                    raise _said_by(self._store.get(_FAILED))
                if time.monotonic() > end_seconds:
                    raise LostRankError(f"timed out after {self._timeout_seconds:g} seconds")
                time.sleep(_POLL_SECONDS)
            return self._store.get(key)

    def _agreed_error(self, error: UserError) -> AgreedError:
        assert self._store is not None
        if isinstance(error, AgreedError):
            return error
        return _said_by(self._store.compare_set(_FAILED, "", json.dumps([self.place.rank, *error.messages])))

    @contextlib.contextmanager
    def losses_named(self) -> Iterator[None]:
        """Raise a :class:`LostRankError` for torch's errors in a collective or in the store, in the block."""
        try:
            yield
        except RuntimeError as error:
            if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise LostRankError(str(error).splitlines()[0]) from None


def _said_by(claim: bytes) -> AgreedError:
    rank, *messages = json.loads(claim)
    return AgreedError(*(message if rank == 0 else f"rank {rank}: {message}" for message in messages))


ALONE = Ranks(Place())
