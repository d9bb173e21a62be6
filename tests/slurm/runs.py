"""Runs of a tiny model, submitted by `infini-train submit`: two nodes, two ranks, ZeRO-2."""

import sys
from pathlib import Path

from tests.helpers.results import logged_losses
from tests.slurm.cluster import ROOT, Cluster, wait_until

STEPS = 1000
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
        words = [sys.executable, "-m", "infini_train", "submit"]
        words += ["--cluster", ROOT / "configs" / "slurm" / "cpu.yaml"]
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
        return logged_losses(self.directory)

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
