"""The command-line parser of the commands whose options jsonargparse reads from signatures."""

import argparse
import os
import sys
from typing import NoReturn

import jsonargparse


class Parser(jsonargparse.ArgumentParser):
    """Reports errors in the form that argparse, and so every other command, uses."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print `PROGRAM: error: MESSAGE`, without the usage of a hundred options, and exit with code 2."""
        if os.environ.get("INFINI_TRACEBACK"):
            raise argparse.ArgumentError(None, message) from ex
        parser = getattr(ex, "subcommand_parser", None) or self
        print(f"{parser.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)
