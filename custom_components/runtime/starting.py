"""The start of a command, before PyTorch is imported, which takes seconds."""

import os
import signal
import sys
from types import FrameType

STOPPED_LINE = "stopped by SIGINT"
IMPORTING_LINE = "importing PyTorch ..."


def start_command() -> None:
    """Let Ctrl-C exit with one line while modules are imported, and say on a terminal what is being waited for.

    A KeyboardInterrupt during an import prints dozens of lines, and some libraries swallow it.
    """
    # note: a SIGINT that the parent ignores (a job in the background, nohup) stays ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave_at_once)
    if sys.stderr.isatty():
        print(IMPORTING_LINE, file=sys.stderr, flush=True)


def start_module() -> None:
    """Do the same where a package is imported for `python -m package.module`, and nothing where it is imported."""
    if sys.argv[0] == "-m":  # until the module itself is found
        start_command()


def take_interrupts() -> None:
    """Make Ctrl-C a KeyboardInterrupt again: from here on there may be files to clean up."""
    if signal.getsignal(signal.SIGINT) is leave_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave_at_once(signal_number: int, _frame: FrameType | None) -> None:
    """Exit without unwinding, as a handler of SIGINT: nothing is open yet, or all of it is closed."""
    # note: print could find stderr's buffer in use by what was interrupted.
    os.write(2, f"\n{STOPPED_LINE}\n".encode())
    os._exit(128 + signal_number)
