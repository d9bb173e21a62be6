"""A run's jobs under SLURM: what slurm/train.sbatch and launch/submit.py noted, and what squeue says."""

import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

SECONDS = 5.0  # for squeue to answer
# What squeue calls a job that has its nodes; any other one waits for them.
RUNNING = {"RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT"}


class Event(NamedTuple):
    """A line of a submission's history; `detail` is a checkpoint's name, `none`, or an exit code."""

    time: float
    job: str
    restart: int
    name: str
    detail: str


class Queued(NamedTuple):
    """A job that squeue knows: its state, why it waits, its nodes."""

    state: str
    reason: str
    nodes: str


@dataclass
class Submission:
    """One directory of RUN/slurm: its jobs' ids, and what happened to them."""

    directory: Path
    jobs: list[str]
    events: list[Event]
    time: float  # of the last thing that happened to it

    @property
    def last(self) -> Event | None:
        return self.events[-1] if self.events else None


class Verdict(NamedTuple):
    """State of a run by its jobs; `state` None: only the signs of life in its other files can tell."""

    state: str | None
    detail: str
    job: str | None
    submission: Submission


def submissions(run: Path) -> list[Submission]:
    """In the order of the last thing that happened to each."""
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
    """None for a line that is not whole."""
    try:
        when, job, restart, name, detail = line.split(maxsplit=4)
        return Event(datetime.fromisoformat(when).timestamp(), job, int(restart), name, detail)
    except ValueError:
        return None


def queue(jobs: Iterable[str]) -> dict[str, Queued] | None:
    """The jobs that have not ended, by id; None if squeue cannot say."""
    ids = [job for job in jobs if job.isdecimal()]
    if not ids:
        return None
    command = ["squeue", "-h", "-j", ",".join(ids), "-o", "%i|%T|%r|%N"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode:  # of a single job that it has forgotten it says this
        return {} if "Invalid job id specified" in answer.stderr else None
    rows = [line.split("|") for line in answer.stdout.splitlines()]
    return {row[0]: Queued(*row[1:]) for row in rows if len(row) == 4}


def restarts(found: list[Submission]) -> dict[str, int]:
    """What ended each start that was followed by another one, and how often."""
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
            return "ended without a word"  # its node was lost, or the job was killed with its script
        case "failed":
            return f"exit code {event.detail}"
        case "completed":
            return "continued"
        case name:
            return name


def verdict(found: list[Submission]) -> Verdict:
    """The state of a run that has submissions."""
    known = queue(job for submission in found for job in submission.jobs)
    here = [(known[job], job, s) for s in reversed(found) for job in s.jobs if job in known] if known else []
    if here:  # the one that runs; else the first that waits, for which the others of its chain wait
        queued, job, current = min(here, key=lambda row: row[0].state not in RUNNING)
        return Verdict(*_state(current, job, queued, True), job, current)
    current = found[-1]
    job = current.last.job if current.last else next(iter(current.jobs), "unknown")
    return Verdict(*_state(current, job, None, known is not None), job, current)


def _state(submission: Submission, job: str, queued: Queued | None, asked: bool) -> tuple[str | None, str]:
    """What to call a submission, and what to say of it. `asked`: squeue has answered."""
    last = submission.last
    event = last.name if last else None
    detail = last.detail if last else ""
    # A job that has noted its end stays a moment, until it is requeued.
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
