"""Reads all checkpoints of runs and tells which are whole."""

from collections.abc import Sequence
from pathlib import Path

from infini_train.run_files import CHECKPOINTS, COMPLETE, files_of, is_checkpoint_name, step_of
from infini_train.training.checkpoint_format import fault_of


def verify(runs: Sequence[Path]) -> bool:
    """Print one line for each checkpoint of these runs, and return whether all of them are whole.

    Args:
        runs: directories of runs, or their `checkpoints` directories.

    Raises:
        FileNotFoundError: one of them has no checkpoints.
    """
    whole = True
    for run in runs:
        directory = run / CHECKPOINTS if (run / CHECKPOINTS).is_dir() else run
        found = [path for path in directory.glob("step-*") if is_checkpoint_name(path.name)]
        if not found:
            raise FileNotFoundError(f"{directory}: found no checkpoints")
        for path in sorted(found, key=step_of):
            fault = fault_of(path) if (path / COMPLETE).is_file() else f"found no file {COMPLETE} in it"
            whole &= fault is None
            if fault is None:
                sums = files_of(path).values()
                old = " (sizes only: it is of an earlier version)" if any(s["xxh3"] is None for s in sums) else ""
                fault = f"whole, {len(sums)} files, {sum(s['size'] for s in sums):,} bytes{old}"
            print(f"{path}: {fault}", flush=True)
    return whole
