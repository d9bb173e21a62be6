"""The console script, called in this process."""

import sys

from infini_train import commands


def command(*words: object) -> int:
    """The console script's exit code."""
    saved, sys.argv = sys.argv, ["infini-train", *map(str, words)]
    try:
        commands.main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    finally:
        sys.argv = saved
    return 0
