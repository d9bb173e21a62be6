"""`infini-train inspect` (or `python -m infini_train.inspection`) and `infini-train report`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from infini_train.errors import OptionParser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options and print the state of runs; raises as `inspect` does."""
    parser = OptionParser(prog="infini-train inspect", description="Show the state of runs.")
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


def report(arguments: Sequence[str] | None = None) -> None:
    """Parse the options and write the report of runs; raises as `write_report` does."""
    description = "Write the curves, memories, evaluations and configurations of runs as one HTML page."
    parser = OptionParser(prog="infini-train report", description=description)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run; several are compared")
    parser.add_argument("--out", type=Path, required=True, help="HTML file to write; an older report is replaced")
    files = "JSON files of `infini-train evaluate`, beside those that lie in the directories of the runs"
    parser.add_argument("--results", nargs="+", type=Path, default=[], metavar="JSON", help=files)
    options = parser.parse_args(arguments)
    from infini_train.inspection.page import write_report

    write_report(options.runs, options.out, options.results)


if __name__ == "__main__":
    main()
