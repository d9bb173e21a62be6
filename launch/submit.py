"""Submit a training run to SLURM: python launch/submit.py --config configs/1b.yaml --nodes 4 --gpus-per-node 8

Everything that can be wrong is checked before anything is queued: options, geometry, datasets, memory of a GPU, the
batch script, the partition's limits. RUN/slurm/NN/ then holds what this submission will run: a snapshot of the code,
the resolved configuration, installed packages, git revision and difference, the batch script. Options of
`infini-train fit` go after `--`. A second submission of a run resumes it.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import jsonargparse

from infini_train.cli import USER_ERRORS, TrainingCLI, train
from infini_train.training.checkpoint_format import latest, step_of
from infini_train.training.footprint import bytes_per_rank, setting_of
from infini_train.training.module import InfiniModule

# It is called from Python, and not within a job.
warnings.filterwarnings("ignore", "LightningCLI's args parameter")
warnings.filterwarnings("ignore", "The `srun` command is available")

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "slurm" / "train.sbatch"
ACTIVE = "PENDING,CONFIGURING,RUNNING,SUSPENDED,COMPLETING,REQUEUED,REQUEUE_HOLD"


@dataclass
class Options:
    """Where and how to run.

    Args:
        config: configuration of the run.
        nodes: number of nodes; sets trainer.num_nodes.
        gpus_per_node: ranks of a node, one a GPU (with trainer.accelerator cpu: processes); sets trainer.devices.
        run: directory of the run; none: runs/NAME, after the configuration.
        partition: of the cluster.
        account: to charge.
        qos: quality of service.
        time: limit of one job, as in sbatch.
        signal_seconds: how long before the time limit to save and leave.
        cpus_per_task: cores of a rank.
        gpu_memory_gib: of one GPU, to refuse what cannot fit; none: not checked.
        max_starts: starts in a row from one checkpoint after which the job gives up.
        preflight: examine all nodes before training.
        environment: file that sets up the environment in the job; none: slurm/environment.sh if there is one.
        sbatch: further options of sbatch.
        chain: jobs that follow one another, for clusters on which jobs may not requeue themselves.
    """

    config: Path
    nodes: int
    gpus_per_node: int
    run: Path | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str = "24:00:00"
    signal_seconds: int = 300
    cpus_per_task: int = 8
    gpu_memory_gib: float | None = None
    max_starts: int = 5
    preflight: bool = True
    environment: Path | None = None
    sbatch: list[str] = field(default_factory=list)
    chain: int = 1


class Checked(TrainingCLI):
    """A configuration checked as far as a login node can, which has none of its devices."""

    def before_instantiate_classes(self) -> None:
        trainer = self.config.fit.trainer
        self.resolved = self._parser("fit").dump(self.config.fit, skip_unset=False)
        self.accelerator, trainer.accelerator = trainer.accelerator, "cpu"

    def _run_subcommand(self, subcommand: str) -> None:
        self.datamodule.trainer = self.trainer
        self.datamodule.setup("fit")
        assert isinstance(self.model, InfiniModule)
        self.model.check_data(self.datamodule)


def seconds(limit: str) -> int:
    """Of a time limit in sbatch's forms. Raises ValueError for another form."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if match is None:
        raise ValueError(f"time: found {limit}, expected minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS")
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    units = [3600, 60, 1] if days or len(parts) == 3 else [60, 1]
    return int(days or 0) * 86400 + sum(a * b for a, b in zip(parts, units, strict=False))


def faults(options: Options) -> list[str]:
    """What is wrong with the options themselves; a sentence each."""
    wrong = []
    for name in ("nodes", "gpus_per_node", "cpus_per_task", "signal_seconds", "max_starts", "chain"):
        if getattr(options, name) < 1:
            wrong.append(f"{name}: found {getattr(options, name)}, expected at least 1")
    if not options.config.is_file():
        wrong.append(f"config: found no file {options.config}")
    if options.environment and not options.environment.is_file():
        wrong.append(f"environment: found no file {options.environment}")
    try:
        if seconds(options.time) <= options.signal_seconds:
            wrong.append(
                f"time: found {options.time}, expected more than signal_seconds = {options.signal_seconds} s"
            )
    except ValueError as error:
        wrong.append(str(error))
    return wrong


def render(options: Options, run: Path, submission: Path, uses_gpus: bool) -> str:
    """slurm/train.sbatch with this submission's options and settings."""
    sbatch = {
        "job-name": run.name,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "nodes": options.nodes,
        "ntasks-per-node": options.gpus_per_node,
        "gpus-per-node": options.gpus_per_node if uses_gpus else None,
        "cpus-per-task": options.cpus_per_task,
        "time": options.time,
        "signal": f"USR1@{options.signal_seconds}",
        "requeue": "",
        "open-mode": "append",
        "chdir": Path.cwd(),
        "output": submission / "%j.log",
    }
    header = [f"--{k}={shlex.quote(str(v))}" if v != "" else f"--{k}" for k, v in sbatch.items() if v is not None]
    header += options.sbatch
    settings = {
        "RUN": run,
        "SUBMISSION": submission,
        "CODE": submission / "code",
        "REQUEUE": int(options.chain == 1),
        "MAX_STARTS": options.max_starts,
        "PREFLIGHT": int(options.preflight),
        "INFINI_ENVIRONMENT": submission / "environment.sh",
    }
    lines = [line for line in SCRIPT.read_text().splitlines() if not line.startswith("#SBATCH")]
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    lines[first:first] = [f"#SBATCH {option}" for option in header]
    place = lines.index("# --- settings") + 1
    lines[place:place] = [f"{name}={shlex.quote(str(value))}" for name, value in settings.items()]
    return "\n".join(lines) + "\n"


def call(*words: str | Path, input: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command. Raises ValueError with its message if it fails, FileNotFoundError if there is none."""
    done = subprocess.run([str(word) for word in words], input=input, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise ValueError(f"{shlex.join(str(word) for word in words)}: {(done.stderr or done.stdout).strip()}")
    return done


def active_jobs(run: Path) -> list[str]:
    """Jobs of this run that are queued or running: `ID STATE` each."""
    ids = {job for file in run.glob("slurm/*/jobs") for job in file.read_text().split()}
    ids |= {line.split()[1] for file in run.glob("slurm/*/history") for line in file.read_text().splitlines()}
    listed = call("squeue", "--noheader", "--me", f"--states={ACTIVE}", "--format=%A %T").stdout.splitlines()
    return [line for line in listed if line.split()[0] in ids]


def check_script(script: str, needs_cluster: bool) -> None:
    """Raises ValueError with what bash or sbatch says against it."""
    call("bash", "-n", "-c", script)
    if needs_cluster or shutil.which("sbatch"):
        call("sbatch", "--test-only", input=script)


def snapshot(directory: Path) -> None:
    """The code as it is now, and all that tells what it is."""
    try:
        listed = call("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout
        files = [Path(name) for name in listed.split("\0") if name]
        status = call("git", "-C", ROOT, "status", "--short").stdout
        (directory / "git.txt").write_text(call("git", "-C", ROOT, "rev-parse", "HEAD").stdout + status)
        (directory / "git.diff").write_text(call("git", "-C", ROOT, "diff", "HEAD").stdout)
    except (ValueError, FileNotFoundError):  # no checkout
        files = [
            f.relative_to(ROOT) for part in ("infini_train", "launch", "slurm") for f in (ROOT / part).rglob("*.*")
        ]
        (directory / "git.txt").write_text("no git checkout\n")
    for file in files:
        if (ROOT / file).is_file():  # not one that is deleted but not committed so
            (directory / "code" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, directory / "code" / file)
    (directory / "pip-freeze.txt").write_text(call(sys.executable, "-m", "pip", "freeze").stdout)


def new_submission(run: Path) -> Path:
    numbers = [int(path.name) for path in run.glob("slurm/[0-9][0-9]")]
    return run / "slurm" / f"{max(numbers, default=0) + 1:02d}"


def submit(options: Options, fit: list[str], dry_run: bool) -> None:
    """Check, write and submit. Raises ValueError, before anything is queued, for what is wrong."""
    if wrong := faults(options):
        raise ValueError("\n".join(wrong))
    run = (options.run or Path("runs") / options.config.stem).absolute()
    environment = options.environment or ROOT / "slurm" / "environment.sh"
    cli = train(
        Checked,
        [
            *("fit", "--config", str(options.config), "--run", str(run), "--ckpt_path", "last", *fit),
            *("--trainer.num_nodes", str(options.nodes), "--trainer.devices", str(options.gpus_per_node)),
        ],
    )
    assert isinstance(cli, Checked)
    assert isinstance(cli.model, InfiniModule)
    uses_gpus = cli.accelerator != "cpu"
    needed = bytes_per_rank(cli.model.config, setting_of(cli.trainer, cli.model, cli.datamodule, gpu=uses_gpus))
    gib = sum(needed.values()) / 2**30
    if uses_gpus and options.gpu_memory_gib and gib > options.gpu_memory_gib:
        kinds = ", ".join(f"{kind} {size / 2**30:.1f}" for kind, size in needed.items())
        raise ValueError(
            f"gpu_memory_gib: a GPU needs about {gib:.1f} GiB ({kinds}), expected at most "
            f"{options.gpu_memory_gib:g}: a higher ZeRO stage, more nodes, model.activation_checkpointing, a smaller "
            "micro-batch or window needs less"
        )
    done = latest(run / "checkpoints")
    if done and step_of(done) >= cli.trainer.max_steps:
        raise ValueError(f"{run}: is complete, step {step_of(done)} of {cli.trainer.max_steps}")
    if (not dry_run or shutil.which("squeue")) and (active := active_jobs(run)):
        raise ValueError(f"{run}: job {', '.join(active)} of this run is active: scancel it, or name another run")
    submission = new_submission(run)
    script = render(options, run, submission, uses_gpus)
    check_script(script, needs_cluster=not dry_run)
    ranks = f"{options.nodes} nodes x {options.gpus_per_node} ranks"
    about = f"{ranks}, {cli.datamodule.lanes} lanes, about {gib:.1f} GiB a rank"
    if dry_run:
        print(f"{script}\n# would be submitted as {submission / 'train.sbatch'}: {about}")
        return
    partial = submission.with_name(submission.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    snapshot(partial)
    (partial / "config.yaml").write_text(cli.resolved)
    (partial / "train.sbatch").write_text(script)
    (partial / "environment.sh").write_text(environment.read_text() if environment.is_file() else "")
    partial.rename(submission)
    jobs: list[str] = []
    for _ in range(options.chain):
        after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        jobs.append(call("sbatch", "--parsable", *after, submission / "train.sbatch").stdout.strip().split(";")[0])
        (submission / "jobs").write_text("\n".join(jobs) + "\n")
    print(f"submitted    job {', '.join(jobs)}: {about}")
    print(f"resumes      {done}" if done else f"run          {run}")
    print(f"log          {submission / jobs[0]}.log")
    print(f"state        infini-train inspect {run}")
    print(f"curves       tensorboard --logdir {run}")


def main() -> None:
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    # --gpus-per-node, as sbatch writes it, is gpus_per_node in a file
    mine = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in words[:split]]
    parser = jsonargparse.ArgumentParser(prog="launch/submit.py", description=__doc__)
    parser.add_argument("--cluster", action="config", help="a file of configs/slurm with these options' defaults")
    parser.add_argument(
        "--dry_run", action="store_true", help="check all, show what would be submitted, write nothing"
    )
    parser.add_class_arguments(Options)
    given = parser.parse_args(mine).as_dict()
    dry_run = given.pop("dry_run")
    given.pop("cluster")
    try:
        submit(Options(**given), words[split + 1 :], dry_run)
    except USER_ERRORS as error:
        if os.environ.get("INFINI_TRACEBACK"):
            raise
        sys.exit(f"submit: error: {error}")


if __name__ == "__main__":
    main()
