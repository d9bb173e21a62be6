"""Collects the state of a run from its files and jobs. The fields of a damaged or missing file are None."""

import json
import math
import statistics
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from infini_train.files import plain_name
from infini_train.run_files import BEST, CHECKPOINTS, COMPLETE, CONFIG, FIRST_ERROR, LATEST, METRICS, files_of, latest

from . import events, slurm

# Number of points to read of each curve.
CURVES = {
    "train/loss": 100,
    "train/tokens": 1,
    "speed/tokens_per_second": 10,
    "speed/step_seconds": 10,
    "val/loss": 1,
    "val/memory_benefit": 1,
}
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where it is built in
CENTURY = 3.2e9  # seconds; a damaged number of steps may give a date that no calendar holds
QUIET = 180.0  # seconds; TensorBoard's files may be written every 120 s only


@dataclass
class Checkpoint:
    """The checkpoint from which a run resumes."""

    name: str
    step: int | None  # optimizer steps done
    time: float | None = None  # when it was written, in seconds since 1970
    bytes: int | None = None
    fault: str | None = None  # what is damaged
    metrics: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass
class Report:
    """What is known about a run. Times are in seconds since 1970; `remaining_seconds` is time of training.

    `state` is one of running, queued, waiting (to run again), preempted, finished, failed, gave up, stopped and not
    started.
    """

    run: str
    state: str = "stopped"
    detail: str = ""
    step: int | None = None
    max_steps: int | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    loss: float | None = None
    validation_loss: float | None = None
    memory_benefit: float | None = None
    validation_step: int | None = None
    restarts: int = 0
    restart_causes: dict[str, int] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    best: str | None = None  # name of the best checkpoint, by checkpoint.best
    last_sign_of_life: float | None = None
    remaining_seconds: float | None = None
    ends: float | None = None
    job: str | None = None
    log: str | None = None
    tensorboard: str | None = None


def examine(run: Path, now: float) -> Report:
    """Report the state of a run.

    Args:
        run: the run's directory.
        now: the time in seconds since 1970.

    Raises:
        FileNotFoundError, NotADirectoryError: if `run` is not a run's directory.
    """
    if not run.exists():
        raise FileNotFoundError(f"{run}: no such directory; expected that of a run")
    if not run.is_dir():
        raise NotADirectoryError(f"{run}: found a file, expected the directory of a run")
    expected = [CONFIG, CHECKPOINTS, "tensorboard", "slurm"]
    if not any((run / name).exists() for name in expected):
        raise FileNotFoundError(f"{run}: not a run's directory: none of {', '.join(expected)} in it")

    submissions = slurm.submissions(run)
    config = read_yaml(_newest([run / CONFIG, *(submission.directory / CONFIG for submission in submissions)]))
    found = Report(str(run), max_steps=_number(_under(config, "trainer", "max_steps")))
    saved = found.checkpoint = _checkpoint(run / CHECKPOINTS)
    found.best = _line(run / CHECKPOINTS / BEST)
    start = _last_start(submissions)
    curves = events.newest(run / "tensorboard", CURVES, start)
    point = {tag: points[0] if points else None for tag, points in curves.points.items()}
    speeds = [_recent(curves, tag) for tag in ("speed/tokens_per_second", "speed/step_seconds")]
    found.tokens_per_second, found.step_seconds = (
        statistics.median(p.value for p in s) if s else None for s in speeds
    )

    found.step, found.tokens, found.loss = _progress(point, saved)
    # Whether curves without a point mean that nothing was logged yet, rather than that their files are damaged.
    unlogged = curves.writers > 0 or not any((run / "tensorboard").glob("events.*"))
    if found.step is None and saved is None and unlogged:
        found.step = 0
    found.validation_loss, found.memory_benefit, found.validation_step = _validation(point, saved)
    times = [curves.time, saved.time if saved else None, _modified(run / CONFIG)]
    life = found.last_sign_of_life = max((time for time in times if time is not None), default=None)

    gaps = [newer.time - older.time for newer, older in pairwise(_recent(curves, "train/loss"))]
    quiet = max([QUIET, *(3 * gap for gap in gaps)])  # a run that is silent for longer has stopped
    validates = _validates(config, found.step, found.validation_step)
    if validates:  # nothing is logged until the validation is over
        quiet = max(quiet, _real(_under(config, "hang_timeout")) or 0.0)
    alive = life is not None and now - life <= quiet
    verdict = slurm.verdict(submissions) if submissions else None
    found.state, found.detail = _state(run, verdict, alive, saved, found.max_steps)
    running = found.state == "running"
    if running and validates:
        found.detail = f"{found.detail}, validating" if found.detail else "validating"

    done = found.step if running else saved.step if saved else 0  # steps that are not saved will be repeated
    total, seconds = found.max_steps, found.step_seconds
    if found.state != "finished" and total is not None and seconds is not None and done is not None:
        remaining = max(0, total - done) * seconds
        if remaining < CENTURY:
            found.remaining_seconds = remaining
    if running and found.remaining_seconds is not None:
        # Each start writes the configuration again, so its time is that of the start.
        newest = point["train/loss"]
        known = [newest.time if newest else None, _modified(run / CONFIG), start[0] if start else None]
        since = max((time for time in known if time is not None), default=now)
        found.ends = max(now, (since if now - since <= quiet else now) + found.remaining_seconds)
    found.restart_causes = slurm.restarts(submissions)
    found.restarts = sum(found.restart_causes.values()) if submissions else max(0, curves.writers - 1)
    if verdict:
        found.job, log = verdict.job, verdict.submission.directory / f"{verdict.job}.log"
        found.log = str(log) if log.is_file() else None
    if (run / "tensorboard").is_dir():
        found.tensorboard = f"tensorboard --logdir {run}"
    return found


def _state(
    run: Path, verdict: slurm.Verdict | None, alive: bool, saved: Checkpoint | None, max_steps: int | None
) -> tuple[str, str]:
    error = _line(run / FIRST_ERROR)
    if verdict and verdict.state == "failed" and error:
        return "failed", f"{error}; {verdict.detail}"
    if verdict and verdict.state:
        return verdict.state, verdict.detail
    detail = verdict.detail if verdict else ""
    if error:  # of the last start, because each start removes the file
        return "failed", error
    if saved and saved.step is not None and max_steps is not None and saved.step >= max_steps:
        return "finished", detail
    return ("running" if alive else "stopped"), detail


def _progress(
    point: dict[str, events.Point | None], saved: Checkpoint | None
) -> tuple[int | None, int | None, float | None]:
    """Return step, tokens and loss from the curves, or from the checkpoint where it is newer."""
    logged, tokens = point["train/loss"], point["train/tokens"]
    if saved and saved.step is not None and (logged is None or logged.step < saved.step):
        return saved.step, _number(saved.metrics.get("tokens")), _real(saved.metrics.get("loss"))
    if logged is None:
        return None, None, None
    return logged.step, int(tokens.value) if tokens and math.isfinite(tokens.value) else None, logged.value


def _validation(
    point: dict[str, events.Point | None], saved: Checkpoint | None
) -> tuple[float | None, float | None, int | None]:
    logged, benefit = point["val/loss"], point["val/memory_benefit"]
    there = _under(saved.metrics, "validation") if saved else None
    step = _number(_under(there, "step"))
    if step is not None and (logged is None or logged.step < step):
        return _real(_under(there, "val/loss")), _real(_under(there, "val/memory_benefit")), step
    if logged is None:
        return None, None, None
    return logged.value, benefit.value if benefit and benefit.step == logged.step else None, logged.step


def _validates(config: Any, step: int | None, validated: int | None) -> bool:
    """Whether a running run is at a step after which it validates, and has not logged the result yet."""
    every = _number(_under(config, "trainer", "val_check_interval"))  # micro-batches
    accumulated = _number(_under(config, "trainer", "accumulate_grad_batches")) or 1
    if not step or not every or _under(config, "data", "validation") is None:
        return False
    return step * accumulated % every == 0 and step != validated


def _checkpoint(directory: Path) -> Checkpoint | None:
    name = _line(directory / LATEST)
    if not name or _modified(directory / name) is None:  # what a resumed run would go on from
        with suppress(OSError, ValueError):
            name = newest.name if (newest := latest(directory)) else name
    if not name:
        return None
    digits = name.removeprefix("step-")
    saved = Checkpoint(name, int(digits) if digits.isdecimal() else None)
    try:
        path = directory / plain_name(name, directory / LATEST)
        saved.time = _modified(path / COMPLETE)
        sizes = {file: sums["size"] for file, sums in files_of(path).items()}
    except OSError:
        saved.fault = f"found no readable {COMPLETE} in it"
        return saved
    except ValueError as error:
        saved.fault = str(error)
        return saved
    for file, size in sizes.items():
        found = _size(path / file)
        if found != size:
            saved.fault = f"{file}: found {'no file' if found is None else f'{found} bytes'}, expected {size}"
            return saved
    saved.bytes = sum(sizes.values())
    saved.metrics = _json(path / METRICS)
    return saved


def _last_start(submissions: list[slurm.Submission]) -> tuple[float, int] | None:
    """Return the time and the step of the newest start under SLURM."""
    starts = [e for submission in submissions for e in submission.events if e.name == "started"]
    if not starts:
        return None
    last = max(starts)
    digits = last.detail.removeprefix("step-")
    return last.time, int(digits) if digits.isdecimal() else 0


def _recent(curves: events.Curves, tag: str) -> list[events.Point]:
    """Return the points of the newest process, or of the process before if it has written none yet."""
    points = curves.points[tag]
    own = [point for point in points if curves.began is not None and point.time >= curves.began]
    return own or points


def _newest(files: list[Path]) -> Path:
    return max(files, key=lambda file: _modified(file) or 0.0)


def _modified(file: Path) -> float | None:
    with suppress(OSError):
        return file.stat().st_mtime
    return None


def _size(file: Path) -> int | None:
    with suppress(OSError, ValueError):  # damage can make a name that is not valid
        return file.stat().st_size
    return None


def _line(file: Path) -> str | None:
    """Return a file's text as one line of printable characters, or None."""
    try:
        text = " ".join(file.read_text(errors="replace").split())
    except OSError:
        return None
    return "".join(c for c in text if c.isprintable()) or None


def read_yaml(file: Path) -> Any:
    """Return what a YAML file holds, or None if it cannot be read."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        return yaml.load(file.read_text(), Loader=LOADER)
    return None


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _under(tree: Any, *names: str) -> Any:
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _real(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not math.isnan(value) else None
