"""How every command reports an error: `infini-train COMMAND: error: MESSAGE` on stderr, and an exit code."""

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

# Input/output errors of a file system or network that may work again at the next start.
TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ECONNRESET, errno.EHOSTUNREACH}
INTERRUPTED = 130  # the exit code after Ctrl-C, as shells give it


def exit_code(error: BaseException, expected: tuple[type[Exception], ...]) -> int:
    """Return 2 for an error that the user must correct, so that no batch script retries it, and 1 for any other."""
    transient = isinstance(error, OSError) and error.errno in TRANSIENT
    transient |= isinstance(error, BlockingIOError)  # another training process holds the run's lock, and will end
    return 2 if isinstance(error, expected) and not transient else 1


def reported(
    name: str,
    function: Callable[..., int | None],
    *arguments: Any,
    expected: tuple[type[Exception], ...] = (ValueError, OSError),
) -> int:
    """Call a command's function and report what it raises.

    Args:
        name: the command as messages name it, for instance `infini-train prep shard`.
        function: called with `arguments`. It returns an exit code; None stands for 0.
        expected: the errors that a user can correct. They are reported as one message without a traceback, unless
            the environment variable INFINI_TRACEBACK is set. All other errors are raised again.

    Returns:
        The exit code.
    """
    try:
        return function(*arguments) or 0
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except expected as error:
        if os.environ.get("INFINI_TRACEBACK"):
            raise
        print(f"{name}: error: {error}", file=sys.stderr)
        return exit_code(error, expected)
