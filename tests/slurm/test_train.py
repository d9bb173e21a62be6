"""Jobs of launch/submit.py on a real cluster: whatever interrupts them, the run is the unbroken job's, to the bit."""

import argparse
import ast
import decimal
import inspect
import mailbox
import os
import random
import signal
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from tests.resume.test_resume import assert_identical, results, tensors
from tests.slurm.conftest import ROOT, Cluster, wait_until

STEPS = 1200
CONFIG = {
    "model": {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "optimizer": {"warmup_steps": 5, "schedule": "wsd", "decay_steps": 0},  # shorter runs have the same rates
    },
    "data": {"segment_length": 8, "segments_per_window": 4, "lanes": 4, "micro_batch_size": 2, "num_workers": 1},
    "trainer": {"accelerator": "cpu", "strategy": "zero2", "max_steps": STEPS, "log_every_n_steps": 1},
    "checkpoint": {"every_n_steps": 100},
}
# How long a job trains must not depend on the machine: its steps sleep.
SLEEP = "--trainer.callbacks", "tests.slurm.slow.Slow", "--trainer.callbacks.seconds"


class Run:
    """A run and its jobs."""

    def __init__(self, cluster: Cluster, directory: Path, config: Path):
        self.cluster, self.directory, self.config = cluster, directory, config
        self.job = ""

    def submit(self, *options: str, fit: tuple[str, ...] = ()) -> None:
        words = [sys.executable, ROOT / "launch" / "submit.py", "--cluster", ROOT / "configs" / "slurm" / "cpu.yaml"]
        words += ["--config", self.config, "--run", self.directory, "--nodes", 2, "--gpus-per-node", 1]
        printed = self.cluster.run(*words, *options, "--", *fit, PYTHONPATH=ROOT)
        self.job = printed.split()[2].rstrip(":,")

    @property
    def submission(self) -> Path:
        return max(self.directory.glob("slurm/[0-9][0-9]"))

    def history(self, event: str) -> list[str]:
        """Details of all events of a kind."""
        file = self.submission / "history"
        lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
        return [" ".join(words[4:]) for words in lines if words[3] == event]

    def wait_for_start(self, number: int, timeout: float = 60) -> None:
        wait_until(lambda: len(self.history("started")) >= number, f"start {number} of job {self.job}", timeout)

    def losses(self) -> list[list[tuple[int, float]]]:
        """Steps and their losses as they were logged, of each start that trained."""
        files = sorted((self.directory / "tensorboard").glob("events.*"), key=lambda file: file.name.split(".")[3])
        found = []
        for file in files:
            values = [(e.step, v) for e in EventFileLoader(str(file)).Load() for v in e.summary.value]
            found.append([(step, v.tensor.float_val[0]) for step, v in values if v.tag == "train/loss"])
        return [values for values in found if values] or [[]]

    def log(self) -> str:
        return (self.submission / f"{self.job}.log").read_text()


def pids(run: Run, rank: int) -> list[int]:
    """Processes of a global rank."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = dict(v.split("=", 1) for v in path.read_bytes().decode().split("\0") if "=" in v)
            words = (path.parent / "cmdline").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if variables.get("SLURM_JOB_ID") == run.job and variables.get("SLURM_PROCID") == str(rank) and "fit" in words:
            found.append(int(path.parent.name))
    return sorted(found)


@pytest.fixture(scope="module")
def config(cluster, tmp_path_factory):
    root = tmp_path_factory.mktemp("slurm")
    sources = [Path(module.__file__) for module in (argparse, ast, decimal, inspect, mailbox, tarfile)]
    prep = (sys.executable, "-m", "data_prep")
    tokenizer = ("--out", root / "tokenizer.model", "--vocab-size", CONFIG["model"]["vocab_size"])
    cluster.run(*prep, "tokenizer", *sources, *tokenizer)
    cluster.run(*prep, "shard", *sources, "--tokenizer", root / "tokenizer.model", "--out", root / "shards")
    options = {**CONFIG, "data": {**CONFIG["data"], "train": str(root / "shards")}}
    (root / "tiny.yaml").write_text(yaml.safe_dump(options))
    return root / "tiny.yaml"


@pytest.fixture(scope="module")
def unbroken(cluster, config):
    run = Run(cluster, config.parent / "unbroken", config)
    run.submit("--preflight", "false")
    assert cluster.wait(run.job, 180) == "COMPLETED", run.log()
    return run


def test_a_job_from_submission_to_export(cluster, unbroken, tmp_path):
    """Two nodes, two ranks, ZeRO-2; the export loads in transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert unbroken.history("completed") == [f"step-{STEPS:08d}"]
    assert [step for step, _ in unbroken.losses()[0]] == list(range(1, STEPS + 1))
    # assert "preflight: all 2 ranks on 2 nodes are well" in unbroken.log()
    submission = unbroken.submission
    head = cluster.run("git", "-C", ROOT, "rev-parse", "HEAD")
    assert (submission / "git.txt").read_text().splitlines()[0] == head
    assert "torch==" in (submission / "pip-freeze.txt").read_text()
    code = (submission / "code" / "infini_train" / "cli.py").read_text()
    assert code == (ROOT / "infini_train" / "cli.py").read_text()
    resolved = yaml.safe_load((submission / "config.yaml").read_text())
    assert resolved["trainer"]["num_nodes"] == 2 and resolved["trainer"]["max_steps"] == STEPS
    checkpoints = unbroken.directory / "checkpoints"
    cluster.run("infini-train", "export", checkpoints, tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export", trust_remote_code=True)
    made = model.generate(**tokenizer("def main():", return_tensors="pt"), max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(made[0], skip_special_tokens=True).startswith("def main():")
    trained = tensors(checkpoints / f"step-{STEPS:08d}")["weight/model.model.norm.weight"]
    assert torch.equal(model.model.norm.weight.data, trained)


GRACEFUL = {"time limit", "urgent preemption", "scancel --signal", "scancel --signal=TERM"}


def test_interrupted_in_every_way(cluster, unbroken, config):
    run = Run(cluster, config.parent / "broken", config)
    run.submit("--preflight", "false", "--time", "1", "--signal-seconds", "20", fit=(*SLEEP, "0.05"))
    begin = time.monotonic()

    def goes_on(what: str, starts: int) -> None:
        """It starts again from where it was or, if it was not asked to leave, from a checkpoint."""
        run.wait_for_start(starts + 1, 90)
        step, started = max(run.losses()[-1], default=(0, 0))[0], run.history("started")[-1]
        print(f"{time.monotonic() - begin:4.0f} s: {what} after step {step}: goes on from {started}")
        if what in GRACEFUL:
            assert started == (f"step-{step:08d}" if step else "none"), run.log()
            assert run.history("preempted")[-1] == started

    def interrupt(what: str, act: Callable[[], object]) -> None:
        starts, trained = len(run.history("started")), len(run.losses())
        wait_until(lambda: len(run.losses()) > trained, f"training after start {starts}", 90)
        time.sleep(2)
        act()
        goes_on(what, starts)

    goes_on("time limit", 1)
    goes_on("time limit", 2)
    cluster.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=30")
    urgent = ("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    interrupt("urgent preemption", lambda: cluster.run(*urgent))
    interrupt("scancel --signal", lambda: cluster.run("scancel", "--signal=USR1", run.job))
    interrupt("scancel --signal=TERM", lambda: cluster.run("scancel", "--signal=TERM", run.job))
    interrupt("scontrol requeue", lambda: cluster.run("scontrol", "requeue", run.job))
    interrupt("kill -9 of rank 1", lambda: [os.kill(pid, signal.SIGKILL) for pid in pids(run, 1)])

    def power_cut() -> None:
        cluster.crash("n2")
        wait_until(lambda: cluster.state(run.job) != "RUNNING", "SLURM notices that n2 is gone", 60)
        cluster.up()

    interrupt("power cut of n2", power_cut)
    assert cluster.wait(run.job, 180) == "COMPLETED", run.log()
    assert_identical(results(run.directory), results(unbroken.directory))


@pytest.mark.parametrize("seconds", [0, 1], ids=["fast steps", "slow steps"])
def test_ten_preemptions_at_random_instants(cluster, unbroken, config, seconds):
    """In start-up, in steps, in saves: every step is done once, and with the unbroken run's loss."""
    run = Run(cluster, config.parent / f"preempted-{seconds}", config)
    run.submit("--preflight", "false", "--max-starts", "11", fit=(*SLEEP, str(seconds)))
    instants = random.Random(seconds)
    for number in range(10):
        run.wait_for_start(number + 1)
        time.sleep(instants.uniform(0, 16))
        cluster.run("scancel", "--signal=USR1", run.job)
        run.wait_for_start(number + 2)
    cluster.run("scancel", run.job)
    assert cluster.wait(run.job, 60) == "CANCELLED"
    assert not run.history("failed"), run.log()
    logged = [value for values in run.losses() for value in values]
    assert len(logged) > 10
    assert logged == unbroken.losses()[0][: len(logged)]
