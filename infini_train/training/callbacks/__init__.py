"""Callbacks that log, check and stop training. checkpoint.py has the one that saves it."""

from .faults import FIRST_ERROR, Faults, exit_code
from .memory_metrics import MemoryMetrics
from .nonfinite import NonFiniteError, NonFiniteGuard
from .progress import ProgressLines, RunProgressBar
from .recall import Recall
from .throughput import Throughput
from .train_metrics import TrainMetrics

__all__ = [
    "FIRST_ERROR",
    "Faults",
    "MemoryMetrics",
    "NonFiniteError",
    "NonFiniteGuard",
    "ProgressLines",
    "Recall",
    "RunProgressBar",
    "Throughput",
    "TrainMetrics",
    "exit_code",
]
