"""What is watched during training, and what stops it."""

from .faults import FIRST_ERROR, Faults, exit_code
from .memory_health import MemoryHealth
from .nonfinite import NonFiniteError, NonFiniteGuard
from .progress import ProgressLines, RunProgressBar
from .recall import Recall
from .throughput import Throughput

__all__ = [
    "FIRST_ERROR",
    "Faults",
    "MemoryHealth",
    "NonFiniteError",
    "NonFiniteGuard",
    "ProgressLines",
    "Recall",
    "RunProgressBar",
    "Throughput",
    "exit_code",
]
