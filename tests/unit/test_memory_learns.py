"""The small version of `make memory-report`: a minute of training, and the memory knows what nothing else can."""

import subprocess
import sys

import torch

from data_prep.__main__ import main as data_prep
from infini_train.data.index import DatasetIndex
from infini_train.evaluation.subject import load
from infini_train.metrics.recall import KINDS, MODES, recall_counts
from infini_train.synthetic import RecallTask, Vocabulary

PAIRS = 16


def test_sixteen_pairs_are_recalled_at_eight_times_the_window(tmp_path):
    """The shipped recipe on shorter documents; without its own memory the model is at chance, 1 in 16."""
    data, directory = tmp_path / "data", tmp_path / "run"
    drawn = f"--documents 2000 --tokens 512 --shortest 256 --keys {PAIRS} --values {PAIRS} --fewest 4"
    assert data_prep(["synth", "--out", str(data), *drawn.split()]) == 0
    options = "--data.segments_per_window 8 --trainer.max_steps 300 --trainer.enable_progress_bar false"
    command = ["fit", "--config", "configs/recall.yaml", "--run", directory, "--data.train", data, *options.split()]
    done = subprocess.run([sys.executable, "-m", "infini_train", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = load(directory / "checkpoints", DatasetIndex.load(data), "cpu", torch.float32)
    counts = recall_counts(model, RecallTask(2048), Vocabulary(PAIRS, PAIRS), count=8, rows=8, seed=0)
    answers = counts.answers[list(KINDS).index("memory_only")].sum()
    right = dict(zip(MODES, counts.correct[list(KINDS).index("memory_only")].sum((1, 2)) / answers, strict=True))
    assert answers > 4000
    assert right["on"] > 0.97 and right["off"] < 0.15 and right["other"] < 0.15, right
