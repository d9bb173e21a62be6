"""The directory of a run's checkpoints: how a new one becomes the latest, and which old ones stay."""

import itertools
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import xxhash

from infini_train.files import sync, write_file, xxh3_of_file
from infini_train.run_files import (
    BEST,
    COMPLETE,
    LATEST,
    METRICS,
    FileSums,
    Record,
    complete,
    files_of,
    is_checkpoint_name,
    point_to,
    read_record,
    step_of,
    write_record,
)

from .best import BestCheckpoint
from .checkpoint_format import read_back


class CheckpointDirectory:
    """Changes the directory `checkpoints` of a run; only rank 0 does.

    Args:
        path: the directory.
        keep_last, keep_every_n_steps, keep_every_hours: as in Checkpointer.
        best: knows the best checkpoint, which is kept; None: none is.

    Attributes:
        foreign: checkpoints in the directory that this run has not written, and will not remove.
    """

    def __init__(
        self,
        path: Path,
        keep_last: int,
        keep_every_n_steps: int | None = None,
        keep_every_hours: float | None = None,
        best: BestCheckpoint | None = None,
    ):
        self.path, self.keep_last, self.best = path, keep_last, best
        self.keep_every_n_steps, self.keep_every_hours = keep_every_n_steps, keep_every_hours
        self.foreign: set[Path] = set()

    def prepare(self) -> None:
        """Make the directory, remove what an interrupted save or removal has left, and find `foreign`."""
        self.path.mkdir(parents=True, exist_ok=True)
        record = self._record_of_those_there()
        write_record(self.path.parent, record)
        for leftover in self.path.iterdir():
            name = leftover.name.removesuffix(".tmp").removesuffix(".removed")
            if leftover.suffix == ".tmp" and is_checkpoint_name(name) and not leftover.is_symlink():
                shutil.rmtree(leftover)
            elif any(leftover.match(f".{pointer}.*.tmp") for pointer in (LATEST, BEST)):
                leftover.unlink()
        # A link leads to what somebody has moved to another place.
        there, saved = complete(self.path), record["saved"]
        self.foreign = {path for path in there if path.is_symlink() or saved.get(path.name, "") != identity(path)}

    def go_on_from(self, path: Path) -> None:
        """Make one of the checkpoints the latest, if it is not, so that a run stays where it went back to."""
        latest = self.path / LATEST
        if not latest.is_file() or latest.read_text(errors="replace") != path.name:
            print(f"infini-train: warning: {latest} names {path.name} from now on", file=sys.stderr, flush=True)
            point_to(self.path / path.name, LATEST)

    def of_step(self, step: int) -> Path:
        """Return the directory of a step's checkpoint."""
        return self.path / f"step-{step:08d}"

    def commit(self, partial: Path, final: Path, files: dict[str, FileSums]) -> None:
        """Make the directory `partial`, which all ranks have written, the latest checkpoint `final`.

        Each of these is on disk before the next is written: the files, COMPLETE, the run's record of what it has
        written, the directory's final name, and `latest`. A crash between any two of them leaves a complete
        checkpoint as the latest, and no checkpoint that the run has written without its entry in the record.

        Args:
            partial, final: the directory, and the name that it gets.
            files: size and digest of each file in it.

        Raises:
            OSError: the files that this process finds are not those that the ranks have written.
        """
        write_complete(partial, files)
        read_back(partial, step_of(final))
        replaced = self._put_aside(final) if final.exists() else None
        sync(self.path)  # a name in the record whose checkpoint is nowhere would count as lost
        self._record(partial, final.name)
        os.rename(partial, final)
        sync(self.path)
        point_to(final, LATEST)
        if replaced is not None:
            shutil.rmtree(replaced)

    def _put_aside(self, path: Path) -> Path | None:
        """Rename a checkpoint whose step the run has reached again, because it was resumed from an older one.

        Returns:
            the new name, if the run has written this checkpoint and may remove it.
        """
        if path not in self.foreign:
            removed = path.with_name(path.name + ".removed.tmp")
            os.rename(path, removed)
            return removed
        self.foreign.remove(path)
        kept = (path.with_name(f"{path.name}.replaced-{number}") for number in itertools.count(1))
        os.rename(path, next(name for name in kept if not name.exists()))
        return None

    def _record(self, directory: Path, name: str) -> None:
        """Record that this run has written the checkpoint in `directory`, which gets this name."""
        record, found = self._record_of_those_there(), identity(directory)
        assert found is not None
        record["saved"][name] = found
        write_record(self.path.parent, record)

    def _record_of_those_there(self) -> Record:
        """Return the run's record without the checkpoints that are not there any more."""
        record = read_record(self.path.parent)
        there = {path.name for path in complete(self.path)}
        record["saved"] = {name: digest for name, digest in record["saved"].items() if name in there}
        return record

    def replace_metrics(self, path: Path, metrics: dict[str, Any]) -> None:
        """Write METRICS anew in a checkpoint, which is complete at any time, if this run has written it."""
        if path in self.foreign:
            return
        files = files_of(path)
        files.pop(METRICS, None)  # until COMPLETE has the new digest, a crash leaves METRICS unlisted, but whole
        write_complete(path, files)
        content = json.dumps(metrics).encode()
        write_file(path / METRICS, content)
        files[METRICS] = FileSums(size=len(content), xxh3=xxh3_of_file(path / METRICS))
        write_complete(path, files)

    def own(self, step: int) -> list[Path]:
        """Return the run's own complete checkpoints up to this step, by step."""
        own = [path for path in complete(self.path) if path not in self.foreign]
        return [path for path in own if step_of(path) <= step]

    def retain(self, newest: Path, metrics: dict[str, Any]) -> None:
        """Remove the run's own checkpoints that no option keeps. Those of later steps than `newest` stay.

        Args:
            newest: a complete checkpoint, which becomes the best one first if it is.
            metrics: content of its METRICS.
        """
        if self.best is not None:
            self.best.completed(newest, metrics)
        last_kept = -math.inf  # when the newest checkpoint that keep_every_hours keeps was written
        for path in self.own(step_of(newest))[: -self.keep_last]:
            if self.best is not None and path == self.best.path:
                continue
            written = (path / COMPLETE).stat().st_mtime
            if self.keep_every_hours and written - last_kept >= 3600 * self.keep_every_hours:
                last_kept = written
            elif not self.keep_every_n_steps or step_of(path) % self.keep_every_n_steps:
                self.remove(path)

    def remove(self, path: Path) -> None:
        """Remove a checkpoint, renamed first, so that a directory with a checkpoint's name is always complete.

        The new name is on disk before the first file goes, or a power cut could bring the old name back.
        """
        removed = path.with_name(path.name + ".removed.tmp")
        os.rename(path, removed)
        sync(self.path)
        shutil.rmtree(removed)


def write_complete(directory: Path, files: dict[str, FileSums]) -> None:
    """Write COMPLETE, with these sizes and digests of a checkpoint's files."""
    sums = {file: [about["size"], about["xxh3"]] for file, about in sorted(files.items())}
    write_file(directory / COMPLETE, json.dumps(sums, separators=(",", ":")).encode())


def identity(checkpoint: Path) -> str | None:
    """Return a digest by which a run knows a checkpoint that it has written; None: its COMPLETE is damaged.

    It is one of the digests of all files but METRICS, which changes when a validation is added.
    """
    try:
        files = files_of(checkpoint)
    except ValueError:
        return None
    sums = sorted((name, about["size"], about["xxh3"]) for name, about in files.items() if name != METRICS)
    return xxhash.xxh3_128(json.dumps(sums).encode()).hexdigest()
