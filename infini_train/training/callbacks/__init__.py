"""What is watched during training, and what stops it."""

from .faults import FIRST_ERROR, Faults, exit_code
from .memory_health import MemoryHealth
from .nonfinite import NonFiniteError, NonFiniteGuard
from .progress import ProgressLines, RunProgressBar
from .throughput import Throughput

__all__ = [
    "FIRST_ERROR",
    "Faults",
    "MemoryHealth",
    "NonFiniteError",
    "NonFiniteGuard",
    "ProgressLines",
    "RunProgressBar",
    "Throughput",
    "exit_code",
]
