"""A process that has imported what `tune` and the recipes import, and forks itself for every command.

`tune` takes 5 seconds of a processor to import torch, torchtune and the recipes, and one more to take them down; a fork
takes a tenth of a second. A fork has one thread: had this process computed anything, OpenMP would wait in its children
for threads that they do not have. So this process only imports, and has one thread itself.

Started by tests/support/forked_tune.py with the number of a Unix socket's descriptor. For each command the socket
brings its arguments and its number of threads in JSON and four descriptors: its stdin, stdout and stderr, and one that
takes its process id and then its exit code.
"""

import atexit
import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import NamedTuple, NoReturn

import custom_components.runtime.tune_startup  # noqa: F401  what llama_lora_recipes.pth does for `tune`
from custom_components.runtime.quiet_bitsandbytes import import_bitsandbytes
from custom_components.runtime.starting import start_command


class Command(NamedTuple):
    arguments: list[str]
    num_threads: int | None  # None: as OMP_NUM_THREADS says, or one for each core
    environment: dict[str, str]


def import_everything() -> None:
    importlib.import_module("torchtune._cli.tune")
    for recipe in sorted(Path("recipes").glob("*.py")):
        importlib.import_module(f"recipes.{recipe.stem}")
        # `tune` runs a recipe as __main__, and runpy warns of one that is imported already.
        del sys.modules[f"recipes.{recipe.stem}"]
    # Imported by a recipe on its way.
    importlib.import_module("datasets")
    importlib.import_module("matplotlib.pyplot")
    import_bitsandbytes()


def next_command(commands: socket.socket) -> Command:
    """Wait for commands until the tests are over; in the forked process of each, return it."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(commands, 1 << 20, 4)
        if not message:
            os._exit(0)
        assert len(list(Path("/proc/self/task").iterdir())) == 1, "a fork of a process with threads"
        if os.fork() == 0:
            commands.close()
            take_the_place_of_a_command(*descriptors)
            return Command(**json.loads(message))
        for descriptor in descriptors:
            os.close(descriptor)


def take_the_place_of_a_command(stdin: int, stdout: int, stderr: int, report: int) -> None:
    """Fork once more: the command's own process, which returns, and one that waits for it and says its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    command = os.fork()
    if command == 0:
        os.close(report)
        for number, descriptor in enumerate((stdin, stdout, stderr)):
            os.dup2(descriptor, number)
            os.close(descriptor)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        start_command()
        return
    for descriptor in (stdin, stdout, stderr):
        os.close(descriptor)
    os.write(report, f"{command}\n".encode())
    _, status = os.waitpid(command, 0)
    os.write(report, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def reap_children(*_: object) -> None:
    """Wait for the processes that have ended, so that what they took of the processor counts as taken by the tests."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def run_tune(command: Command) -> NoReturn:
    """Run the command and leave as the interpreter does, but for taking down the modules."""
    sys.argv = command.arguments
    os.environ |= command.environment
    if command.num_threads is not None:
        importlib.import_module("torch").set_num_threads(command.num_threads)
    exit_code: object = 0
    try:
        exit_code = importlib.import_module("torchtune._cli.tune").main()
    except SystemExit as exit:
        exit_code = exit.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        exit_code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if isinstance(exit_code, str):
        print(exit_code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code if isinstance(exit_code, int) else int(exit_code is not None))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, whose end closes the socket
    signal.signal(signal.SIGCHLD, reap_children)
    socket_of_commands = socket.socket(fileno=int(sys.argv[1]))
    import_everything()
    run_tune(next_command(socket_of_commands))
