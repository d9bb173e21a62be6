"""The batch script begins from the checkpoint that was given, and a restart of the job goes on with the run."""

import os
import subprocess
from pathlib import Path

import yaml

from infini_train.cli import train
from launch.submit import Checked
from tests.helpers.datasets import make_dataset
from tests.helpers.runs import arguments, fit

SCRIPT = Path(__file__).parents[2] / "slurm" / "train.sbatch"
PROGRAMS = {
    "scontrol": '[ "$1" = -o ] && echo JobState=COMPLETING || echo n1',
    "python": 'echo "python $*" >>calls',
    "srun": 'echo "srun $*" >>calls; echo "{}" >"$RUN/run.json"',  # fit records that the run has begun
}


def test_the_given_checkpoint_is_for_the_first_start_only(tmp_path):
    (tmp_path / "bin").mkdir()
    for name, text in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    settings = {"RUN": "run", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1", "PREFLIGHT": "0"}
    settings |= {"SLURM_NTASKS_PER_NODE": "1", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    words = ["bash", SCRIPT, "c.yaml", "--ckpt_path", "other"]
    for _ in range(2):
        subprocess.run(words, cwd=tmp_path, env={**os.environ, **settings}, check=True, capture_output=True)
    resolves, first, second = (tmp_path / "calls").read_text().splitlines()
    assert "fit --config c.yaml --ckpt_path last --ckpt_path other --run run" in resolves
    assert first.endswith("fit --config run/slurm/7/config.yaml")
    assert second.endswith("fit --config run/slurm/7/config.yaml --ckpt_path last")


def test_the_resolved_configuration_of_a_submission_names_the_given_checkpoint(tmp_path):
    make_dataset(tmp_path / "shards", [300, 45, 120, 200])
    assert fit(tmp_path / "other", tmp_path / "shards", "--trainer.max_steps", "2").code == 0
    words = [*arguments(tmp_path / "run", tmp_path / "shards"), "--ckpt_path", str(tmp_path / "other")]
    resolved = yaml.safe_load(train(Checked, words).resolved)
    assert resolved["ckpt_path"] == str(tmp_path / "other")
    assert not (tmp_path / "run").exists()
