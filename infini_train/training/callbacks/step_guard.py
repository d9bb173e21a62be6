"""Leaves out optimizer steps that would do harm: a loss that leaps, a loss or gradient that is not finite."""

import json
import math
import statistics
import sys
from collections import deque
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from infini_train.data.batches import Batch
from infini_train.data.datamodule import LaneDataModule
from infini_train.files import atomic_file, not_a_link
from infini_train.run_files import SKIPPED_STEPS

from ..module import InfiniModule
from ..step_callback import StepCallback
from ..strategy import ZeroStrategy


class NonFiniteError(RuntimeError):
    """The loss or a gradient is not finite. The weights are still those of the last good step."""


class SkippedStepsError(RuntimeError):
    """Too many steps in a row were left out. The weights are still those of the last good step."""


class StepGuard(StepCallback):
    """Checks the loss and the total gradient norm of every optimizer step before it is taken.

    Gradients are averaged over ranks before the check, so if the norm is not finite on one rank it is not on any, and
    all ranks act alike. Under ZeRO, where no rank has all gradients, DeepSpeed measures the norm and skips a step
    whose gradients are not finite; a step that must be skipped for another reason is given such gradients.

    A step that is left out changes neither the weights nor the optimizer's state. Data, memories and the learning
    rate go on. The file SKIPPED_STEPS in the run's directory names the documents of each such step.

    Args:
        directory: directory of the run. A rank writes its micro-batches of a step that is not finite there, for
            replay.
        nonfinite: `stop` ends the run before a step that is not finite; `skip` leaves the step out and empties
            memories that are not finite.
        spike_threshold: leave out a step whose loss is more than this many standard deviations above the mean of the
            last steps that were taken; None: no such step is left out.
        spike_window: number of last steps in this mean, which is not used before there are half as many.
        max_skips: end the run when so many steps in a row were left out.

    Raises:
        ValueError: numbers out of range; the message lists all of them.
    """

    def __init__(
        self,
        directory: Path,
        nonfinite: Literal["stop", "skip"] = "stop",
        spike_threshold: float | None = None,
        spike_window: int = 128,
        max_skips: int = 10,
    ):
        wrong = []
        if spike_threshold is not None and not 0 < spike_threshold < math.inf:
            wrong.append(f"spike_threshold: found {spike_threshold}, expected more than 0, or none")
        if spike_window < 4:
            wrong.append(f"spike_window: found {spike_window}, expected at least 4")
        if max_skips < 1:
            wrong.append(f"max_skips: found {max_skips}, expected at least 1")
        if wrong:
            raise ValueError("\n".join(wrong))
        self.directory, self.nonfinite, self.max_skips = directory, nonfinite, max_skips
        self.spike_threshold, self.spike_window = spike_threshold, spike_window
        self.losses: deque[float] = deque(maxlen=spike_window)  # of the last steps that were taken
        self.skipped = self.skipped_in_a_row = 0
        self.batches: list[dict[str, Any]] = []  # of the current step
        self.step = 0
        self.loss: float | None = None  # of the current step, over all ranks; None if no threshold is set
        self.spike: str | None = None  # why the current step is a spike; None: it is none
        self.norm: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        found = {"losses": list(self.losses), "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        return found if any(found.values()) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses = deque(state_dict["losses"] if self.spike_threshold else [], maxlen=self.spike_window)
        self.skipped, self.skipped_in_a_row = state_dict["skipped"], state_dict["skipped_in_a_row"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = self.directory / SKIPPED_STEPS
        if trainer.is_global_zero and path.is_file():  # steps after the checkpoint are repeated
            lines = [line for line in path.read_text().splitlines(True) if _step_of(line) < trainer.global_step]
            with atomic_file(path) as file:
                file.write("".join(lines).encode())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.batches, self.step = [], trainer.global_step
            self.loss = self.spike = None
        self.batches.append({k: batch[k] for k in ("input_ids", "labels", "starts", "docs", "lane_ids")})

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        # DeepSpeed must know before the last backward pass of the step that it has to skip the step.
        if isinstance(trainer.strategy, ZeroStrategy) and len(self.batches) == trainer.accumulate_grad_batches:
            self._find_spike(trainer, pl_module)
            if self.spike is not None:
                loss.register_hook(lambda gradient: gradient * math.nan)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if isinstance(trainer.strategy, ZeroStrategy):
            return
        self._find_spike(trainer, pl_module)
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.norm = torch.nn.utils.get_total_norm(gradients)
        if not self._good(trainer, pl_module):
            for p in pl_module.parameters():
                p.grad = None  # the optimizer skips parameters without a gradient

    def on_step_end(self, trainer: Trainer, module: InfiniModule, batch: Batch) -> None:
        if isinstance(trainer.strategy, ZeroStrategy):
            self.norm = torch.as_tensor(trainer.strategy.deepspeed_engine.get_global_grad_norm())
            if self.spike is not None:
                self.norm = None  # that of the gradients which made DeepSpeed skip the step
            self._good(trainer, module)

    def _find_spike(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out whether the step's loss is a spike, with one device sync. All ranks come to the same result."""
        if self.spike_threshold is None:
            return
        assert isinstance(pl_module, InfiniModule)
        self.loss = pl_module.mean_step_loss().item()
        found = False
        if math.isfinite(self.loss) and len(self.losses) >= self.spike_window // 2:
            mean, deviation = statistics.fmean(self.losses), statistics.stdev(self.losses)
            found = self.loss > mean + self.spike_threshold * deviation
        if trainer.strategy.reduce_boolean_decision(found, all=False):
            self.spike = (
                f"its loss {self.loss:.4f} is more than {self.spike_threshold:g} standard deviations "
                f"({statistics.stdev(self.losses):.4f}) above the mean of {len(self.losses)} steps "
                f"({statistics.fmean(self.losses):.4f})"
            )

    def _good(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Return whether the step may be taken.

        Raises:
            NonFiniteError, SkippedStepsError: the run must stop.
        """
        assert isinstance(pl_module, InfiniModule)
        assert pl_module.step_loss is not None
        if self.spike is not None:
            if trainer.is_global_zero:
                print(f"infini-train: left out step {self.step}: {self.spike}", file=sys.stderr, flush=True)
            reason = self.spike
        elif self.norm is not None and torch.isfinite(self.norm) and torch.isfinite(pl_module.step_loss):
            if self.loss is not None:
                self.losses.append(self.loss)
            self.skipped_in_a_row = 0
            return True
        else:
            reason = self._non_finite(trainer, pl_module)
        self.skipped += 1
        self.skipped_in_a_row += 1
        self._record(trainer, pl_module, reason)
        if self.skipped_in_a_row >= self.max_skips:
            raise SkippedStepsError(
                f"step {self.step}: found {self.skipped_in_a_row} steps in a row that had to be left out "
                f"(max_skips), this one because {reason}; their documents are in {self.directory / SKIPPED_STEPS}. "
                "Go on from an older checkpoint with a lower learning rate, or with another threshold"
            )
        return False

    def _non_finite(self, trainer: Trainer, module: InfiniModule) -> str:
        """Write this rank's micro-batches of the step, and return what is not finite.

        Raises:
            NonFiniteError: the run must stop.
        """
        assert self.norm is not None and module.step_loss is not None
        rank = trainer.global_rank
        path = self.directory / f"nonfinite-step-{self.step:08d}-rank-{rank:05d}.pt"
        with atomic_file(path) as file:
            torch.save(self.batches, file)
        lanes = [lane for batch in self.batches for lane in batch["lane_ids"].tolist()]
        values = f"loss {module.step_loss.item():g} and gradient norm {self.norm.item():g}"
        message = (
            f"step {self.step}, rank {rank}: found {values}, expected finite numbers; lanes {lanes}, "
            f"documents {self._documents()}; micro-batches dumped to {path}"
        )
        if self.nonfinite == "stop":
            raise NonFiniteError(message)
        emptied = module.lanes.empty_non_finite()
        print(f"infini-train: left out {message}; memories emptied: {emptied}", file=sys.stderr, flush=True)
        return f"its {values} are not finite"

    def _documents(self) -> list[int]:
        """Return the numbers of the documents in this rank's micro-batches of the step."""
        return sorted({d for batch in self.batches for d in batch["docs"].unique().tolist()})

    def _record(self, trainer: Trainer, module: InfiniModule, reason: str) -> None:
        """Write a line with the documents of all ranks into SKIPPED_STEPS; all ranks must call this."""
        of_ranks = [self._documents()] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(of_ranks, self._documents())
        loss = module.mean_step_loss().item()
        if trainer.is_global_zero:
            data = trainer.datamodule  # type: ignore[attr-defined]
            numbers = sorted(set().union(*of_ranks))
            streamed = not isinstance(data, LaneDataModule)
            documents = [{"document": n} for n in numbers] if streamed else data.describe(numbers)
            line = {"step": self.step, "reason": reason, "loss": loss, "documents": documents}
            with open(self.directory / SKIPPED_STEPS, "a", opener=not_a_link) as file:
                file.write(json.dumps(line) + "\n")
        trainer.strategy.barrier()  # no rank ends the job before the line is written


def _step_of(line: str) -> float:
    """Return the step of a line of SKIPPED_STEPS; of a line that was cut off, infinity."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
