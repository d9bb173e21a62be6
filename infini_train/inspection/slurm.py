"""A run's jobs under SLURM, from the files of slurm/train.sbatch and launch/submit.py and from squeue."""

import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

SECONDS = 5.0  # in which squeue must answer
# The states of a job that has its nodes. In any other state it waits for them.
RUNNING = {"RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT"}


class Event(NamedTuple):
    """A line of a submission's history. `detail` is a checkpoint's name, `none`, or an exit code."""

    time: float
    job: str
    restart: int
    name: str
    detail: str


class Queued(NamedTuple):
    """A job in the queue: its state, the reason why it waits, and its nodes."""

    state: str
    reason: str
    nodes: str


@dataclass
class Submission:
    """One directory of RUN/slurm: the ids of its jobs, and what happened to them."""

    directory: Path
    jobs: list[str]
    events: list[Event]
    time: float  # of the last event

    @property
    def last(self) -> Event | None:
        return self.events[-1] if self.events else None


class Verdict(NamedTuple):
    """State of a run by its jobs. If `state` is None, only the signs of life in the run's other files can tell."""

    state: str | None
    detail: str
    job: str | None
    submission: Submission


def submissions(run: Path) -> list[Submission]:
    """Return a run's submissions in the order of their last events."""
    found = []
    for directory in run.glob("slurm/*"):
        jobs, history = directory / "jobs", directory / "history"
        files = [file for file in (jobs, history) if file.is_file()]
        if not files:
            continue
        events = [event for line in _text(history).splitlines() if (event := _event(line))]
        ids = dict.fromkeys([*_text(jobs).split(), *(event.job for event in events)])
        time = events[-1].time if events else max(file.stat().st_mtime for file in files)
        found.append(Submission(directory, list(ids), events, time))
    return sorted(found, key=lambda submission: submission.time)


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _event(line: str) -> Event | None:
    """Parse a line of history, or return None for a line that is incomplete."""
    try:
        when, job, restart, name, detail = line.split(maxsplit=4)
        return Event(datetime.fromisoformat(when).timestamp(), job, int(restart), name, detail)
    except ValueError:
        return None


def queue(jobs: Iterable[str]) -> dict[str, Queued] | None:
    """Return the jobs that have not ended, by id, or None if squeue does not answer."""
    ids = [job for job in jobs if job.isdecimal()]
    if not ids:
        return None
    command = ["squeue", "-h", "-j", ",".join(ids), "-o", "%i|%T|%r|%N"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode:  # the message for a single job that has left the queue
        return {} if "Invalid job id specified" in answer.stderr else None
    rows = [line.split("|") for line in answer.stdout.splitlines()]
    return {row[0]: Queued(*row[1:]) for row in rows if len(row) == 4}


def restarts(found: list[Submission]) -> dict[str, int]:
    """Count what ended the starts that were followed by another start."""
    causes: Counter[str] = Counter()
    before = None
    for event in sorted(event for submission in found for event in submission.events):
        if event.name == "started" and before is not None:
            causes[_cause(before)] += 1
        before = event
    return dict(causes)


def _cause(event: Event) -> str:
    match event.name:
        case "started":
            return "ended without a word"  # the node was lost, or the job was killed with its script
        case "failed":
            return f"exit code {event.detail}"
        case "completed":
            return "continued"
        case name:
            return name


def verdict(found: list[Submission]) -> Verdict:
    """Return the state of a run that has submissions."""
    known = queue(job for submission in found for job in submission.jobs)
    here = [(known[job], job, s) for s in reversed(found) for job in s.jobs if job in known] if known else []
    if here:  # the running job, or else the first of a chain whose other jobs wait for it
        queued, job, current = min(here, key=lambda row: row[0].state not in RUNNING)
        return Verdict(*_state(current, job, queued, True), job, current)
    current = found[-1]
    job = current.last.job if current.last else next(iter(current.jobs), "unknown")
    return Verdict(*_state(current, job, None, known is not None), job, current)


def _state(submission: Submission, job: str, queued: Queued | None, asked: bool) -> tuple[str | None, str]:
    """Return the state of a submission and a sentence about it. `asked` tells whether squeue has answered."""
    last = submission.last
    event = last.name if last else None
    detail = last.detail if last else ""
    # A job that has logged its end stays in the queue for a moment, until it is requeued.
    runs = queued is not None and queued.state in RUNNING and event not in ("preempted", "failed")
    if queued is None:
        where = f"job {job} is not in the queue" if asked else "squeue does not answer, the queue is unknown"
    elif runs:
        where = f"{'' if queued.state == 'RUNNING' else queued.state.lower() + ' '}on {queued.nodes}"
    else:
        again = "waits to run again" if last else "waits"
        where = f"job {job} {again}{'' if queued.reason in ('None', '') else f' ({queued.reason})'}"
    match event:
        case "completed":
            return "finished", ""
        case "gave-up":
            return "gave up", f"start after start from checkpoint {detail} led to no new one"
        case "failed":
            return "failed", f"exit code {detail}; {where}"
        case "preempted":
            return ("stopped" if queued is None and asked else "preempted"), where
    if runs:
        return "running", where
    if last is None:
        return ("not started" if queued is None and asked else "queued"), where
    if queued is None and not asked:
        return None, where
    return ("stopped" if queued is None else "waiting"), f"job {last.job} ended without a word; {where}"
