"""Errors that the user can mend, and the exit codes of a recipe."""

import signal
import sys
import time
from collections.abc import Callable

from custom_components.runtime.launched import EXIT_CODE_USER_ERROR, place_of_process
from custom_components.runtime.starting import STOPPED_LINE, leave_at_once, take_interrupts
from custom_components.runtime.terminal import allow_any_text, is_stdout_closed, leave_closed_terminal, say, visible

_REFUSAL_SECONDS = 5.0
EXIT_CODE_CLOSED_STDOUT = 141  # 128 + SIGPIPE, as of other programs whose reader has left


class UserError(ValueError):
    """An error that the user can mend. The message names the value, the key or file and line, and what to do.

    Several problems found together are passed as several messages, and printed one `error:` line each.
    """

    def __init__(self, *messages: str) -> None:
        assert messages
        # What others wrote may have several lines, or move the cursor.
        self.messages = tuple(visible(" ".join(message.splitlines())) for message in messages)
        super().__init__("\n".join(self.messages))


def run_recipe(recipe_main: Callable[[], None], *, is_for_ranks: bool = False) -> None:
    """Run a recipe's main function and exit with the code for how it ended.

    0 when done, 2 after a :class:`UserError` (its lines on stderr, no traceback), 128 + its number after a signal, 141
    when nobody reads its output any more, as after `| head`. Anything else is a bug and keeps its traceback.

    Args:
        is_for_ranks: the recipe is one for several processes that work as one; another is refused in them.
    """
    # note: not at the top of a file that `--help` and the first error lines need at once: it imports torch
    from custom_components.runtime.out_of_memory import is_out_of_memory

    take_interrupts()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(number, _raise_system_exit)
    allow_any_text()
    try:
        if not is_for_ranks:
            _refuse_ranks()
        recipe_main()
        sys.stdout.flush()
    except UserError as error:
        print_errors(error)
        sys.exit(EXIT_CODE_USER_ERROR)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        say(f"error: {reason} Lower batch_size or max_seq_len, or set quantize_base=true", sys.stderr)
        sys.exit(EXIT_CODE_USER_ERROR)
    except BrokenPipeError:
        if not is_stdout_closed():
            raise
        sys.exit(EXIT_CODE_CLOSED_STDOUT)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, leave_at_once)  # threads may still have to end
        # A terminal has shown `^C`, and stays on that line.
        say(f"\n{STOPPED_LINE}" if sys.stderr.isatty() else STOPPED_LINE, sys.stderr)
        sys.exit(128 + signal.SIGINT)


def print_errors(error: UserError) -> None:
    """Print one `error:` line for each problem; on a terminal it is broken between words."""
    for message in error.messages:
        say(f"error: {message}", sys.stderr)


def _refuse_ranks() -> None:
    """Refuse to run a recipe of one process in several, each of which would do all of its work.

    Raises:
        UserError: in the first of them; the others exit with the same code.
    """
    place = place_of_process()
    if place.num_ranks == 1:
        return
    if not place.is_first:
        time.sleep(_REFUSAL_SECONDS)  # note: when one has ended, the launcher ends the first, which has to say why
        sys.exit(EXIT_CODE_USER_ERROR)
    raise UserError(
        f"--nproc_per_node: {place.num_ranks} processes were started, and this recipe is for one; leave the option "
        "out, or train an adapter with recipes/lora_distributed.py"
    )


def _raise_system_exit(signal_number: int, _frame: object) -> None:
    if signal_number == signal.SIGHUP:
        leave_closed_terminal()
    sys.exit(128 + signal_number)
