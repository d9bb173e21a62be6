"""Measures the speed of training: tokens/s, step time, share of time spent waiting for data, MFU and peak memory.

For a mixture, it also logs the share of each dataset in all tokens so far.
"""

import resource
import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from infini_train.model.flops import flops_per_token

from ..module import InfiniModule

# Dense bf16 peak FLOP/s by device name (vendors' data sheets).
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}


def measured_peak(size: int = 1024) -> float:
    """Return this CPU's best measured float32 matrix-product rate with torch's threads, FLOP/s, as a peak for MFU."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(8):
        begin = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def peak_flops(device: torch.device) -> float | None:
    """Return a device's peak FLOP/s: from data sheets for known GPUs, measured on a CPU, and otherwise None."""
    if device.type == "cpu":
        return measured_peak()
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)


class Throughput(Callback):
    """Logs speed/* every log_every_n_steps, over the steps since it last did; excludes validation and saves."""

    def __init__(self) -> None:
        self.peak: float | None = None
        self.tokens = self.steps = 0
        self.working = self.waiting = 0.0
        self.begin: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if self.begin is not None:
            self.waiting += now - self.begin
        self.begin = now

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.leave_out()

    def on_save_checkpoint(self, *args: Any) -> None:
        self.leave_out()

    def leave_out(self) -> None:
        """Do not count the time from the end of the last batch to the next one as waiting for data."""
        self.begin = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, InfiniModule)
        now = time.perf_counter()
        if self.begin is not None:  # a callback may save in the midst of a batch
            self.working += now - self.begin
        self.begin = now
        self.tokens += batch["input_ids"].numel() * trainer.world_size
        if not pl_module.ends_step(batch_idx):
            return
        self.steps += 1
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        elapsed = self.working + self.waiting
        rate = self.tokens / elapsed
        values = {
            "speed/tokens_per_second": rate,
            "speed/step_seconds": elapsed / self.steps,
            "speed/data_wait_share": self.waiting / elapsed,
            "speed/peak_memory_gib": self._peak_memory(pl_module.device) / 2**30,
        }
        if self.peak is None:  # here and not at the start, because measuring it takes a CPU 0.2 s
            self.peak = peak_flops(pl_module.device)
        if self.peak:
            values["speed/mfu"] = rate * flops_per_token(pl_module.config) / (self.peak * trainer.world_size)
        values |= {f"data/share {name}": share for name, share in batch.get("data_shares", {}).items()}
        pl_module.log_values(values)
        self.tokens = self.steps = 0
        self.working = self.waiting = 0.0
        self.begin = time.perf_counter()

    @staticmethod
    def _peak_memory(device: torch.device) -> int:
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
