"""Recipes on several ranks: forked with the variables that torchrun would give them, or started by it."""

import os
import socket
import subprocess
from collections.abc import Sequence

from tests.support.forked_tune import LIMIT_SECONDS, ForkedTune
from tests.support.paths import PROJECT
from tests.support.recipe_runs import TUNE

RECIPE = "recipes/lora_distributed.py"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class ForkedRanks:
    """The ranks of a run without a launcher: whoever ends, ends alone.

    Args:
        arguments: of all of them.
        of_rank: one more argument of each.
    """

    def __init__(self, num_ranks: int, *arguments: str, recipe: str = RECIPE, of_rank: Sequence[str] = ()) -> None:
        port = str(free_port())
        self.processes = []
        for rank in range(num_ranks):
            environment = {
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)},
                **{"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            }
            own = [of_rank[rank]] if of_rank else []
            process = ForkedTune("run", recipe, *arguments, *own, num_threads=1, environment=environment)
            self.processes.append(process)

    def results(self, timeout_seconds: float = LIMIT_SECONDS) -> list[subprocess.CompletedProcess[str]]:
        return [process.result(timeout_seconds) for process in self.processes]


def launched_tune(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """`tune` itself, which hands over to torchrun."""
    return subprocess.Popen(
        [str(TUNE), *arguments],
        cwd=PROJECT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
