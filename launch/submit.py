"""Submit a training run to SLURM: infini-train submit --config configs/1b.yaml --nodes 4 --gpus_per_node 8

Options, geometry, datasets, the memory of a GPU, the batch script and the partition's limits are checked before
anything is queued. RUN/slurm/NN/ then holds what this submission runs: a snapshot of the code, the resolved
configuration, the installed packages, the git revision and difference, and the batch script. Options of
`infini-train fit` go after `--`. A second submission of a run resumes it.
"""

import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from infini_train.cli import USER_ERRORS, TrainingCLI, train
from infini_train.commands import with_underscores
from infini_train.errors import reported
from infini_train.parsing import Parser
from infini_train.run_files import CHECKPOINTS, latest, step_of
from infini_train.training.footprint import bytes_per_rank, setting_of
from infini_train.training.module import InfiniModule

warnings.filterwarnings("ignore", "The `srun` command is available")  # Lightning's advice to use it right here

ROOT = Path(__file__).resolve().parent.parent  # a checkout, or the directory of an installation
PACKAGES = ("infini_train", "data_prep", "launch", "slurm")
SCRIPT = ROOT / "slurm" / "train.sbatch"
ACTIVE = "PENDING,CONFIGURING,RUNNING,SUSPENDED,COMPLETING,REQUEUED,REQUEUE_HOLD"


@dataclass
class Options:
    """Where and how to run.

    Args:
        config: Configuration of the run.
        nodes: Number of nodes; sets trainer.num_nodes.
        gpus_per_node: Ranks of a node, one for each GPU (or process, with trainer.accelerator cpu); sets
            trainer.devices.
        run: Directory of the run; by default runs/NAME, after the name of the configuration.
        partition: Partition of the cluster.
        account: Account to charge.
        qos: Quality of service.
        time: Time limit of one job, in sbatch's format.
        signal_seconds: Seconds before the time limit at which the job saves a checkpoint and ends.
        cpus_per_task: Cores of a rank.
        gpu_memory_gib: Memory of one GPU in GiB, to refuse what cannot fit; by default it is not checked.
        max_starts: Number of consecutive starts from the same checkpoint after which the job gives up.
        preflight: Check all nodes before training.
        environment: File that sets up the environment of the job; by default slurm/environment.sh if it exists.
        sbatch: Further options of sbatch.
        chain: Number of jobs that follow one another, for clusters on which jobs may not requeue themselves.
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
    """Checks a configuration as far as a login node can, which may have no GPU."""

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        trainer = self.config.fit.trainer
        self.resolved = self._parser("fit").dump(self.config.fit, skip_unset=False)
        self.accelerator, trainer.accelerator = trainer.accelerator, "cpu"

    def _run_subcommand(self, subcommand: str) -> None:
        self.datamodule.trainer = self.trainer
        self.datamodule.setup("fit")
        assert isinstance(self.model, InfiniModule)
        self.model.check_data(self.datamodule)


def seconds(limit: str) -> int:
    """Convert a time limit in one of sbatch's formats to seconds. Raises ValueError for any other format."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if match is None:
        raise ValueError(f"time: found {limit}, expected minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS")
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    units = [3600, 60, 1] if days or len(parts) == 3 else [60, 1]
    return int(days or 0) * 86400 + sum(a * b for a, b in zip(parts, units, strict=False))


def faults(options: Options) -> list[str]:
    """Return a sentence for each option that is wrong by itself."""
    wrong = []
    for name in ("nodes", "gpus_per_node", "cpus_per_task", "signal_seconds", "max_starts", "chain"):
        if getattr(options, name) < 1:
            wrong.append(f"{name}: found {getattr(options, name)}, expected at least 1")
    if options.gpu_memory_gib is not None and not options.gpu_memory_gib > 0:
        wrong.append(f"gpu_memory_gib: found {options.gpu_memory_gib}, expected more than 0")
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
    """Return slurm/train.sbatch with this submission's options and settings."""
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
    start = lines.index("# --- settings") + 1
    lines[start:start] = [f"{name}={shlex.quote(str(value))}" for name, value in settings.items()]
    return "\n".join(lines) + "\n"


def call(*words: str | Path, input: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command. Raises ValueError with its message if it fails, or FileNotFoundError if it does not exist."""
    done = subprocess.run([str(word) for word in words], input=input, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise ValueError(f"{shlex.join(str(word) for word in words)}: {(done.stderr or done.stdout).strip()}")
    return done


def active_jobs(run: Path) -> list[str]:
    """Return the jobs of this run that are queued or running, each as `ID STATE`."""
    ids = {job for file in run.glob("slurm/*/jobs") for job in file.read_text().split()}
    ids |= {line.split()[1] for file in run.glob("slurm/*/history") for line in file.read_text().splitlines()}
    listed = call("squeue", "--noheader", "--me", f"--states={ACTIVE}", "--format=%A %T").stdout.splitlines()
    return [line for line in listed if line.split()[0] in ids]


def check_script(script: str, needs_cluster: bool) -> None:
    """Raise ValueError with the message of bash or sbatch if one of them rejects the script."""
    call("bash", "-n", "-c", script)
    if needs_cluster or shutil.which("sbatch"):
        call("sbatch", "--test-only", input=script)


def snapshot(directory: Path) -> None:
    """Copy the code as it is now, with its git revision and the list of installed packages."""
    try:
        if not (ROOT / ".git").exists():  # else git would look at a repository that holds the installation
            raise FileNotFoundError(ROOT / ".git")
        listed = call("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout
        files = [Path(name) for name in listed.split("\0") if name]
        status = call("git", "-C", ROOT, "status", "--short").stdout
        (directory / "git.txt").write_text(call("git", "-C", ROOT, "rev-parse", "HEAD").stdout + status)
        (directory / "git.diff").write_text(call("git", "-C", ROOT, "diff", "HEAD").stdout)
    except (ValueError, FileNotFoundError):  # an installation
        found = [file for package in PACKAGES for file in (ROOT / package).rglob("*.*")]
        files = [file.relative_to(ROOT) for file in found if file.suffix != ".pyc"]
        (directory / "git.txt").write_text("no git checkout\n")
    for file in files:
        if (ROOT / file).is_file():  # leaves out files that were deleted without a commit
            (directory / "code" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, directory / "code" / file)
    (directory / "pip-freeze.txt").write_text(call(sys.executable, "-m", "pip", "freeze").stdout)


def new_submission(run: Path) -> Path:
    """Return the directory of the next submission, RUN/slurm/NN."""
    numbers = [int(path.name) for path in run.glob("slurm/[0-9][0-9]")]
    return run / "slurm" / f"{max(numbers, default=0) + 1:02d}"


def submit(options: Options, fit: list[str], dry_run: bool) -> None:
    """Check a submission, write its directory and queue its jobs. Raises ValueError before anything is queued."""
    if wrong := faults(options):
        raise ValueError("\n".join(wrong))
    run = (options.run or Path("runs") / options.config.stem).absolute()
    places = (ROOT / "slurm" / "environment.sh", Path("slurm/environment.sh"))
    environment = options.environment or next((file for file in places if file.is_file()), places[0])
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
            f"{options.gpu_memory_gib:g}: a higher ZeRO stage, more nodes, model.activation_checkpointing, "
            "model.segments_per_chunk, a smaller micro-batch or window needs less"
        )
    done = latest(run / CHECKPOINTS)
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
    print(f"begins from  {cli.begins_from}" if cli.begins_from else f"run          {run}")
    print(f"log          {submission / jobs[0]}.log")
    print(f"state        infini-train inspect {run}")
    print(f"curves       tensorboard --logdir {run}")


class SubmitParser(Parser):
    """Tells where options of `fit` belong, which `submit` does not know."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if re.match(r"unrecognized arguments: --\w+\.", message):
            message += "; options of `infini-train fit` go after `--`"
        super().error(message, ex)


def main(arguments: Sequence[str] | None = None) -> int:
    """`infini-train submit`; returns the exit code."""
    name = "infini-train submit"
    words = with_underscores(sys.argv[1:] if arguments is None else arguments)
    split = words.index("--") if "--" in words else len(words)
    parser = SubmitParser(prog=name, description=__doc__)
    parser.add_argument("--cluster", action="config", help="File of configs/slurm with defaults for these options.")
    parser.add_argument(
        "--dry_run", action="store_true", help="Check everything and show the batch script, but write nothing."
    )
    parser.add_class_arguments(Options)
    given = parser.parse_args(words[:split]).as_dict()
    dry_run = given.pop("dry_run")
    given.pop("cluster")
    return reported(name, submit, Options(**given), words[split + 1 :], dry_run, expected=USER_ERRORS)


if __name__ == "__main__":
    sys.exit(main())
