"""The command-line parser of the commands whose options jsonargparse reads from signatures, and what they name."""

import argparse
import os
import sys
from typing import Any, NoReturn

import jsonargparse

KNOWN_PACKAGES = ("infini_train", "lightning", "torch")


def foreign_classes(options: Any) -> set[str]:
    """Return the classes of other packages than infini_train, lightning and torch that a configuration names.

    Args:
        options: the configuration, parsed or not: dictionaries, namespaces and lists, however deep.
    """
    if isinstance(options, list | tuple):
        return set().union(*map(foreign_classes, options))
    if isinstance(options, jsonargparse.Namespace):
        options = vars(options)
    if not isinstance(options, dict):
        return set()
    name = options.get("class_path")
    own = {name} if isinstance(name, str) and name.split(".")[0] not in KNOWN_PACKAGES else set()
    return own.union(*map(foreign_classes, options.values()))


class Parser(jsonargparse.ArgumentParser):
    """Reports errors in the form that argparse, and so every other command, uses."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print `PROGRAM: error: MESSAGE`, without the usage of a hundred options, and exit with code 2."""
        if os.environ.get("INFINI_TRACEBACK"):
            raise argparse.ArgumentError(None, message) from ex
        parser = getattr(ex, "subcommand_parser", None) or self
        print(f"{parser.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)
