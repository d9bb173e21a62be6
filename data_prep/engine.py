"""Runs the stages of a preparation as datatrove tasks, on this machine or as SLURM array jobs.

A stage is a datatrove pipeline whose work is divided among a number of tasks. A finished task leaves a marker, with
its log and statistics beside it, and is not run again. A stage starts when all tasks of the previous stage are done.
"""

import dataclasses
import os
import shlex
import sys
from contextlib import redirect_stderr
from copy import copy, deepcopy
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from datatrove.executor.base import DistributedEnvVars, PipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from data_prep.parallel import ordered_map, progress_bar

ENVIRONMENT = "slurm/environment.sh"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A datatrove pipeline and the number of tasks that share its work."""

    name: str
    pipeline: list[PipelineStep]
    tasks: int


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Resources that SLURM jobs request, read from a cluster file (configs/slurm/) as launch/submit.py uses it."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str = "24:00:00"
    cpus_per_task: int = 1
    sbatch: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: Path) -> "Cluster":
        """Read a cluster file; fields that only training jobs use are ignored. Raises ValueError for a bad file."""
        try:
            given = yaml.safe_load(path.read_text())
            names = [field.name for field in dataclasses.fields(cls)]
            found = cls(**{name: given[name] for name in names if name in given})
            for option in found.sbatch:
                if not option.startswith("--"):
                    raise ValueError(f"sbatch: found {option!r}, expected an option, --name=value")
        except (yaml.YAMLError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None
        return found


class LocalExecutor(PipelineExecutor):
    """Runs the tasks of one stage in processes of this machine.

    Datatrove's own local executor waits for ever when a worker is killed, as happens when memory runs out.
    """

    def __init__(self, stage: Stage, workers: int, logs: Path):
        super().__init__(stage.pipeline, str(logs / stage.name))
        self.stage, self.workers = stage, workers

    def run(self) -> None:
        """Run all unfinished tasks. Raises a task's own error, or RuntimeError if a worker dies."""
        ranks = self.get_incomplete_ranks()
        with progress_bar() as progress:
            done = self.stage.tasks - len(ranks)
            bar = progress.add_task(self.stage.name, total=self.stage.tasks, completed=done, note="")
            for _ in ordered_map(self._task, ranks, min(self.workers, max(1, len(ranks)))):
                progress.advance(bar)

    def _task(self, rank: int) -> None:
        own = copy(self)
        own.pipeline = deepcopy(self.pipeline)  # each task has its own statistics
        with redirect_stderr(StringIO()):  # the log has everything, and the parent reports a failure once
            own._run_for_rank(rank)
        logger.remove()

    @property
    def world_size(self) -> int:
        return self.stage.tasks

    def get_distributed_env(self, node_rank: int = -1) -> DistributedEnvVars:
        # What datatrove expects of an executor; nothing here runs on several machines.
        return DistributedEnvVars(
            datatrove_node_ips="localhost",
            datatrove_cpus_per_task="-1",
            datatrove_mem_per_cpu="-1",
            datatrove_gpus_on_node="-1",
            datatrove_executor="LOCAL",
        )


class SlurmExecutor(SlurmPipelineExecutor):
    """Runs the tasks of one stage as a SLURM array job, which starts after the job `after` has succeeded."""

    def __init__(self, stage: Stage, workers: int, logs: Path, cluster: Cluster, after: "SlurmExecutor | None"):
        # Jobs run with this Python, after sourcing the environment file of the site, if there is one.
        environment = os.environ.get("INFINI_ENVIRONMENT", ENVIRONMENT)
        path = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
        source = f"source {shlex.quote(os.path.abspath(environment))}; " if Path(environment).is_file() else ""
        options = dict(option.removeprefix("--").partition("=")[::2] for option in cluster.sbatch)
        # Without kill-on-invalid-dep, a stage whose predecessor has failed would stay in the queue for ever.
        given: dict[str, Any] = {"open-mode": "append", "kill-on-invalid-dep": "yes", "mem-per-cpu": None}
        given |= {"account": cluster.account, **options}
        super().__init__(
            stage.pipeline,
            tasks=stage.tasks,
            time=cluster.time,
            partition=cluster.partition,
            qos=cluster.qos,
            cpus_per_task=cluster.cpus_per_task,
            workers=workers,
            job_name=f"infini-prep-{stage.name}",
            env_command=path + "; " + source,
            sbatch_args=given,
            depends=after,
            logging_dir=str(logs / stage.name),
            slurm_logs_folder=str(logs / stage.name / "slurm"),
        )

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        """Return datatrove's sbatch options without those that have no value."""
        return {name: value for name, value in super().get_sbatch_args(max_array).items() if value is not None}

    def launch_merge_stats(self) -> None:
        """Do nothing: datatrove would submit another job, but the last stage reports the totals."""


def run_here(stages: list[Stage], workers: int, logs: Path) -> None:
    """Run all stages on this machine, at most `workers` tasks at once. Raises the error of a failing task."""
    logger.remove()
    for stage in stages:
        LocalExecutor(stage, workers, logs).run()


def submit(stages: list[Stage], workers: int, logs: Path, cluster: Cluster) -> list[str]:
    """Submit the unfinished tasks of all stages to SLURM, each stage after the previous one; return the job ids."""
    logger.remove()
    jobs: list[SlurmExecutor] = []
    for stage in stages:
        after = jobs[-1] if jobs else None
        job = SlurmExecutor(stage, workers, logs, cluster, after)
        job.launch_job()
        jobs.append(job)
    return [str(job.job_id) for job in jobs if job.job_id != -1]  # -1: datatrove found nothing left to do
