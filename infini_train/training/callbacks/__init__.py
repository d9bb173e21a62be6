"""What is watched during training, and what stops it."""

from .memory_health import MemoryHealth
from .nonfinite import NonFiniteError, NonFiniteGuard
from .progress import RunProgressBar
from .throughput import Throughput

__all__ = ["MemoryHealth", "NonFiniteError", "NonFiniteGuard", "RunProgressBar", "Throughput"]
