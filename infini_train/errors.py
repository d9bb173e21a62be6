"""How every command reports an error: `infini-train COMMAND: error: MESSAGE` on stderr, and an exit code."""

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

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


def closest(word: str, names: Iterable[str]) -> str:
    """Return `; did you mean NAME?` with the name most like `word` up to a `=`, or nothing if none is like it."""
    near = difflib.get_close_matches(word.split("=")[0], list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


class OptionParser(argparse.ArgumentParser):
    """argparse's parser, with errors of one line from the command that was called, be it a subcommand."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but refuse unknown words here, where the options of the subcommand are known."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(
                f"unrecognized arguments: {' '.join(unknown)}{closest(unknown[0], self._option_string_actions)}"
            )
        return options, unknown

    def error(self, message: str) -> NoReturn:
        """Print `PROGRAM: error: MESSAGE` and where the options are listed, and exit with code 2."""
        print(f"{self.prog}: error: {message} (`{self.prog} --help` lists the options)", file=sys.stderr)
        sys.exit(2)
