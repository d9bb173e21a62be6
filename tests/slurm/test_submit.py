"""What `infini-train submit` refuses before anything is queued, and how jobs end that cannot go on."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from infini_train.commands import main
from tests.slurm.cluster import ROOT, wait_until
from tests.slurm.runs import SLEEP, Run

GOLDEN = ROOT / "tests" / "golden" / "submit-dry-run.txt"
CPU = "--cluster", ROOT / "configs" / "slurm" / "cpu.yaml"


def submit(directory: Path, *words) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "infini_train", "submit", *words]
    return subprocess.run([str(word) for word in command], cwd=directory, capture_output=True, text=True)


def test_a_dry_run_is_the_golden_file_and_writes_nothing(cluster, config, tmp_path):
    gpu = "--cluster", ROOT / "configs" / "slurm" / "gpu.yaml"
    geometry = "--nodes", 2, "--gpus-per-node", 1, "--cpus-per-task", 2
    done = submit(tmp_path, *gpu, "--config", config, *geometry, "--dry-run", "--", "--trainer.accelerator", "gpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace(str(tmp_path), "/home/user") == GOLDEN.read_text()
    assert not list(tmp_path.iterdir())


REFUSED = {
    "partition": (["--partition", "nope"], "invalid partition specified: nope"),
    "time format": (["--time", "5x"], "time: found 5x, expected minutes, MM:SS"),
    "time too short": (["--time", "2"], "time: found 2, expected more than signal_seconds = 120 s"),
    "limit of the cluster": (["--cpus-per-task", "64"], "Requested node configuration is not available"),
    "lanes": (["--nodes", "1"], "data.lanes: found 4, expected micro_batch_size * world size"),
    "no config": (["--config", "no.yaml"], "config: found no file no.yaml"),
    "unknown option": (["--", "--model.hiden_size", "3"], "hiden_size"),
    "no data": (["--", "--data.train", "nowhere"], "train: nowhere"),
    "no memory": (["--gpu-memory-gib", "0"], "gpu_memory_gib: found 0.0, expected more than 0"),
    "memory": (
        ["--gpu-memory-gib", "0.001", "--", "--trainer.accelerator", "gpu"],
        "gpu_memory_gib: a GPU needs about",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_queued(cluster, config, tmp_path, monkeypatch, capfd, name):
    options, message = REFUSED[name]
    geometry = "--nodes", 2, "--gpus-per-node", 1, "--run", tmp_path / f"refused {name}"
    words = [str(word) for word in (*CPU, "--config", config, *geometry, *options)]
    monkeypatch.setattr(sys, "argv", ["infini-train", "submit", *words])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        main()
    said = f"{refused.value.code} {capfd.readouterr().err}"
    assert message in said and "Traceback" not in said, said
    assert not cluster.run("squeue", "--states=all", "--noheader", f"--name=refused {name}")
    assert not list(tmp_path.iterdir())


def test_a_cancelled_job_stays_so_and_a_second_submission_resumes(cluster, config, tmp_path):
    run = Run(cluster, tmp_path / "run", config)
    run.submit("--preflight", "false", fit=(*SLEEP, "0.05"))
    wait_until(run.losses, "training", 60)
    again = submit(tmp_path, *CPU, "--config", config, "--nodes", 2, "--gpus-per-node", 1, "--run", tmp_path / "run")
    assert again.returncode != 0 and f"job {run.job} RUNNING of this run is active" in again.stderr
    cluster.run("scancel", run.job)
    assert cluster.wait(run.job, 60) == "CANCELLED"
    left = run.losses()[-1][-1][0]
    assert run.history("preempted") == [f"step-{left:08d}"], run.log()  # there was time to save
    run.submit("--preflight", "false", fit=("--trainer.max_steps", str(left + 10)))
    assert run.submission.name == "02"
    assert cluster.wait(run.job, 90) == "COMPLETED", run.log()
    assert run.history("started") == [f"step-{left:08d}"]
    logged = [step for values in run.losses() for step, _ in values]
    assert logged == list(range(1, left + 11))
    done = submit(
        tmp_path,
        *CPU,
        "--config",
        config,
        "--nodes",
        2,
        "--gpus-per-node",
        1,
        "--run",
        tmp_path / "run",
        "--",
        "--trainer.max_steps",
        left + 10,
    )
    assert done.returncode != 0 and "is complete" in done.stderr


def test_a_mistake_that_shows_in_the_job_ends_it(cluster, config, tmp_path):
    shards = shutil.copytree(config.parent / "shards", tmp_path / "shards")
    run = Run(cluster, tmp_path / "run", config)
    run.submit("--preflight", "false", "--sbatch", "[--hold]", fit=("--data.train", str(shards)))
    shutil.rmtree(shards)
    cluster.run("scontrol", "release", run.job)
    assert cluster.wait(run.job, 90) == "FAILED"
    assert run.history("started") == ["none"] and run.history("failed") == ["2"], run.log()
    assert f"train: {shards}" in run.log()


@pytest.mark.slow
def test_a_fault_that_stays_ends_the_job_after_some_starts(cluster, config, tmp_path):
    run = Run(cluster, tmp_path / "run", config)
    run.submit("--preflight", "false", "--max-starts", "2", fit=("--trainer.callbacks", "tests.slurm.slow.Fails"))
    assert cluster.wait(run.job, 120) == "FAILED"
    assert run.history("started") == ["none"] * 2 and run.history("gave-up") == ["none"], run.log()
    assert "RuntimeError: planted" in run.log()


@pytest.mark.slow
def test_a_chain_of_jobs(cluster, config, tmp_path):
    run = Run(cluster, tmp_path / "run", config)
    run.submit("--preflight", "false", "--chain", "3", fit=("--trainer.max_steps", "150", *SLEEP, "0.05"))
    jobs = (run.submission / "jobs").read_text().split()
    wait_until(run.losses, "training", 60)
    cluster.run("scancel", "--signal=USR1", jobs[0])
    assert cluster.wait(jobs[0], 60) == "COMPLETED"
    left = run.history("preempted")[0]
    assert cluster.wait(jobs[1], 90) == "COMPLETED"
    assert run.history("started") == ["none", left] and run.history("completed") == ["step-00000150"]
    assert cluster.wait(jobs[2], 30) == "CANCELLED"  # nothing is left to do
    assert [step for values in run.losses() for step, _ in values] == list(range(1, 151))


@pytest.mark.slow
def test_by_hand(cluster, config, tmp_path):
    """sbatch slurm/train.sbatch, as its first lines say."""
    options = "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--parsable"
    fit = "--trainer.max_steps", "20"
    job = cluster.run(
        "sbatch",
        *options,
        f"--output={tmp_path}/log",
        f"--chdir={tmp_path}",
        ROOT / "slurm" / "train.sbatch",
        config,
        *fit,
        RUN="runs/hand",
        CODE=ROOT,
        PREFLIGHT="0",
    )
    assert cluster.wait(job, 90) == "COMPLETED", (tmp_path / "log").read_text()
    assert (tmp_path / "runs/hand/checkpoints/latest").read_text() == "step-00000020"
    resolved = yaml.safe_load((tmp_path / "runs/hand/slurm" / job / "config.yaml").read_text())
    assert resolved["trainer"]["num_nodes"] == 2
