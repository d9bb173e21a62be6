"""Tensorboard, and loggers that a configuration adds to it: a run that resumes goes on in the same one of each.

A logger's own name for a run (of W&B, MLflow, Comet, a directory of CSVLogger) is drawn when it starts. It is kept in
the run's directory, and given to the logger at the next start.
"""

import copy
import csv
import itertools
import json
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import Logger
from tensorboard.summary.writer import event_file_writer

from infini_train.files import atomic_file, named, plain_name
from infini_train.run_files import read_json

LOGGERS = "loggers.json"  # in the run's directory
NAMES_OF_A_RUN = ("run_id", "experiment_key", "version")  # parameters of the loggers that take this name


class RunBoard(TensorBoardLogger):
    """TensorBoard's log of a run, which names each process's events file after those of the earlier ones.

    Readers order the files by the times in their names, and drop what a later process has logged again. Where the
    clock was set back, or another node's is slow, they would drop the new points instead of the old ones.
    """

    @property
    def experiment(self) -> Any:
        if self._experiment is not None:
            return self._experiment
        names = [path.name for path in Path(self.log_dir).glob("events.out.tfevents.*")]
        times = [int(found[1]) for name in names if (found := re.match(r"events\.out\.tfevents\.(\d{10})\.", name))]
        clock, first = event_file_writer.time, max(times, default=0) + 1
        # The writer asks for the time of the name first, and then for that of its first event.
        asked = itertools.chain([max(time.time(), first)], iter(time.time, None))
        event_file_writer.time = SimpleNamespace(time=lambda: next(asked))
        try:
            board = super().experiment
        finally:
            event_file_writer.time = clock
        if threading.excepthook is not _name_the_file:
            threading.excepthook = _name_the_file
        return board

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        try:
            super().log_metrics(metrics, step)  # type: ignore[arg-type]
        except ValueError as error:  # with which Lightning covers that the disk is full
            raise (error.__cause__ if isinstance(error.__cause__, OSError) else error) from None


def _name_the_file(failed: threading.ExceptHookArgs, otherwise: Any = threading.excepthook) -> None:
    """Do not print the error of the thread that writes an events file: whoever logs next gets it, with the file."""
    thread, error = failed.thread, failed.exc_value
    if isinstance(thread, event_file_writer._AsyncWriterThread) and isinstance(error, OSError):
        thread.exception = named(error, Path(os.fsdecode(thread._record_writer._writer.filename)))
    else:
        otherwise(failed)


class ContinuedFile(ExperimentWriter):
    """Writes the metrics.csv of a resumed run, whose earlier lines Lightning's writer would delete.

    Args:
        log_dir: directory of the file.
        step: the checkpoint's step. Later lines are of steps that will be repeated, and are dropped.
    """

    def __init__(self, log_dir: str, step: int):
        self.step = step
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            self.metrics_keys = list(reader.fieldnames or ["step"])
            # A line that was cut off has no step.
            rows = [row for row in reader if (row["step"] or "").isdecimal() and int(row["step"]) <= self.step]
        text = StringIO()
        writer = csv.DictWriter(text, self.metrics_keys)
        writer.writeheader()
        writer.writerows(rows)
        with atomic_file(path) as whole:
            whole.write(text.getvalue().encode())


def continued(given: Any, run: Path) -> Any:
    """Return the option `trainer.logger` with each logger's name for this run, if it was started before.

    Args:
        given: the parsed option. A name in it stays.
        run: the run's directory.

    Raises:
        ValueError: the file with the names is damaged.
    """
    given, path = copy.deepcopy(given), run / LOGGERS
    if not path.is_file():
        return given
    loggers, names = given if isinstance(given, list) else [given], read_json(path)
    if not isinstance(names, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in names):
        raise ValueError(f"{path}: damaged: found {str(names)[:80]}, expected the kind and the name of each logger")
    for logger, (kind, name) in zip(loggers, names, strict=False):
        if isinstance(logger, Namespace) and logger.class_path.rpartition(".")[2] == kind:
            options = logger.init_args
            parameter = next((p for p in NAMES_OF_A_RUN if p in options), None)
            if parameter is not None and options[parameter] is None and options.get("id") is None:
                # Some loggers make a directory of it.
                options[parameter] = plain_name(name, path) if isinstance(name, str) else name
    return given


def start(loggers: Sequence[Logger], run: Path, step: int) -> None:
    """Start the loggers on rank 0, and keep their names for this run.

    Args:
        loggers: those of the option `trainer.logger`.
        run: the run's directory.
        step: the step of the checkpoint that the run resumes, or 0.
    """
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            logger._experiment = ContinuedFile(logger.log_dir, step)
        else:
            _ = getattr(logger, "experiment", None)  # draws the name
    if loggers:
        with atomic_file(run / LOGGERS) as file:
            names = [[type(logger).__name__, logger.version] for logger in loggers]
            file.write(json.dumps(names).encode())
