"""Jobs of `infini-train submit` on a real cluster: an interrupted run is the unbroken one, to the bit."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import yaml

from tests.helpers.results import assert_identical, results, tensors
from tests.slurm.cluster import ROOT, wait_until
from tests.slurm.runs import SLEEP, STEPS, Run, pids


@pytest.fixture(scope="module")
def unbroken(cluster, config):
    run = Run(cluster, config.parent / "unbroken", config)
    run.submit()
    assert cluster.wait(run.job, 180) == "COMPLETED", run.log()
    return run


def test_a_job_from_submission_to_export(cluster, unbroken, tmp_path):
    """Two nodes, two ranks, ZeRO-2; the export loads in transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert unbroken.history("completed") == [f"step-{STEPS:08d}"]
    assert [step for step, _ in unbroken.losses()[0]] == list(range(1, STEPS + 1))
    assert "preflight: all 2 ranks on 2 nodes are well" in unbroken.log()
    submission = unbroken.submission
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    head = git.stdout.strip() if git.returncode == 0 else "no git checkout"
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
    run.submit("--preflight", "false", "--time", "30", "--signal-seconds", "20", fit=(*SLEEP, "0.05"))
    begin = time.monotonic()

    def goes_on(what: str, starts: int) -> None:
        """It starts again from where it was or, if it was not asked to leave, from a checkpoint."""
        run.wait_for_start(starts + 1, 90)
        trained, started = run.losses(), run.history("started")[-1]
        step = trained[-1][-1][0] if trained else 0
        print(f"{time.monotonic() - begin:4.0f} s: {what} after step {step}: goes on from {started}")
        if what in GRACEFUL:
            assert started == (f"step-{step:08d}" if step else "none"), run.log()
            assert run.history("preempted")[-1] == started

    def limit(minutes: str) -> None:
        cluster.run("scontrol", "update", f"JobId={run.job}", f"TimeLimit={minutes}")

    def interrupt(what: str, act: Callable[[], object]) -> None:
        starts, trained = len(run.history("started")), len(run.losses())
        wait_until(lambda: len(run.losses()) > trained, f"training after start {starts}", 90)
        time.sleep(2)
        act()
        goes_on(what, starts)

    run.wait_for_start(1)
    limit("1")  # SLURM's least
    goes_on("time limit", 1)
    limit("30")
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


@pytest.mark.slow
def test_ten_preemptions_at_random_instants(cluster, unbroken, config):
    """In start-up, in steps, in saves: every step is done once, and with the unbroken run's loss."""

    def preempted(seconds: int) -> Run:
        run = Run(cluster, config.parent / f"preempted-{seconds}", config)
        # Starts that are cut off before their first step lead nowhere, so they may not be counted here.
        run.submit("--preflight", "false", "--max-starts", "11", fit=(*SLEEP, str(seconds)))
        instants = random.Random(seconds)
        for number in range(10):
            trained = len(run.losses())
            run.wait_for_start(number + 1)
            if number % 2:  # start-up is long: half of the instants are in training
                wait_until(lambda trained=trained: len(run.losses()) > trained, "training", 90)
            time.sleep(instants.uniform(0, 5 if number % 2 else 16))
            cluster.run("scancel", "--signal=USR1", run.job)
            run.wait_for_start(number + 2)
        return run

    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(preempted, [0, 1]))  # steps as fast as they are, and of a second
    for run in runs:
        cluster.run("scancel", run.job)
        assert cluster.wait(run.job, 60) == "CANCELLED"
        assert not run.history("failed"), run.log()
        logged = [value for values in run.losses() for value in values]
        print(f"{len(logged)} steps in {len(run.losses())} starts that trained")
        assert len(logged) > 10
        assert logged == unbroken.losses()[0][: len(logged)]
