"""`infini-train inspect` (or `python -m infini_train.inspection`)."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options and print the state of runs; raises as `inspect` does."""
    parser = argparse.ArgumentParser(prog="infini-train inspect", description="Show the state of runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run; several make a table")
    parser.add_argument("--json", action="store_true", help="print one JSON object per run, for scripts")
    parser.add_argument(
        "--verify", action="store_true", help="read all checkpoints of these runs instead, and compare their digests"
    )
    options = parser.parse_args(arguments)
    # Imported here, so that --help answers at once.
    if options.verify:
        from infini_train.inspection.verify import verify

        if not verify(options.runs):
            sys.exit(1)
        return
    from infini_train.inspection.show import inspect

    inspect(options.runs, options.json)


if __name__ == "__main__":
    main()
