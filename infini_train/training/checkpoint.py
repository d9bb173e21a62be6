"""When and how the checkpoints of a run are saved and restored. checkpoint_format.py describes the format.

A save has two parts. While training waits, every rank copies its weights, optimizer state and memories to the CPU
(`Checkpointer.save`). A thread then writes the copies and reads them back while training goes on. At the end of a
later step, when all ranks have finished writing, rank 0 makes the directory the latest checkpoint, and removes old
ones (checkpoint_directory.py). A checkpoint is always of the end of an optimizer step, because gradients accumulated
so far are not stored. A validation may come in the middle of a step (`Boundary`).
"""

import copy
import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from infini_train import preemption
from infini_train.data.batches import Batch
from infini_train.data.lanes import Cursor
from infini_train.model.memory_rule import MemoryState
from infini_train.run_files import BEST, CONFIG, CURSOR, METRICS, MODEL_CONFIG, FileSums, latest, read_json, step_of

from . import fragments, lane_memory
from .best import BestCheckpoint
from .callbacks.throughput import Throughput
from .checkpoint_directory import CheckpointDirectory
from .checkpoint_format import write_bytes, write_tensors
from .checkpoint_io import DirectoryIO, parameter_table
from .lightning_patches import rescale_batch_counters, validates_before_next_step, validates_now
from .module import InfiniModule
from .step_callback import StepCallback
from .strategy import ZeroStrategy
from .validation import check_metric


class Boundary(NamedTuple):
    """What a checkpoint holds of the end of a step that a validation in the middle of the next step has changed.

    Attributes:
        loops: Lightning's counters.
        lanes: the memories, `LaneMemory.groups`.
        step_loss: this rank's share of the step's loss; None if the run has not made a step yet.
    """

    loops: dict[str, Any]
    lanes: dict[tuple[int, ...], list[MemoryState]]
    step_loss: torch.Tensor | None


class Saving(NamedTuple):
    """A save in progress.

    Attributes:
        written: future of the thread that writes this rank's files: their sizes and digests.
        partial, final: the directory that is being written, and its final name.
        metrics: content of METRICS. It is written last, with the result of a validation that follows the step.
    """

    written: Future[dict[str, FileSums]]
    partial: Path
    final: Path
    metrics: dict[str, Any]


class Checkpointer(StepCallback, Checkpoint):
    """Saves and restores the checkpoints of a run.

    Args:
        directory: the run's `checkpoints` directory.
        throughput: measures the speed of training, without the saves.
        every_n_steps: optimizer steps between checkpoints; another one is written at the end of training.
        keep_last: number of newest checkpoints to keep.
        keep_every_n_steps: keep checkpoints whose step is a multiple of this for good; none: keep only the newest.
        keep_every_hours: keep one checkpoint per this many hours for good; none: keep only the newest.
        best: name of a metric that validations log, such as `val/loss`. A validation in which it is better than ever
            before is followed by a save, unless its step is saved anyway, and the best checkpoint is kept beside the
            newest; its name is in the file `best`. None: only the newest are kept.
        best_mode: `min` if lower values of that metric are better, `max` if higher ones are.

    Raises:
        ValueError: numbers with which checkpoints could not be made or kept; the message lists all of them.
    """

    def __init__(
        self,
        directory: Path,
        throughput: Throughput,
        every_n_steps: int = 500,
        keep_last: int = 2,
        keep_every_n_steps: int | None = None,
        keep_every_hours: float | None = None,
        best: str | None = None,
        best_mode: Literal["min", "max"] = "min",
    ):
        least = {"every_n_steps": every_n_steps, "keep_last": keep_last, "keep_every_n_steps": keep_every_n_steps}
        wrong = [
            f"checkpoint.{name}: found {n}, expected at least 1"
            for name, n in least.items()
            if n is not None and n < 1
        ]
        if keep_every_hours is not None and not keep_every_hours > 0:
            wrong.append(f"checkpoint.keep_every_hours: found {keep_every_hours}, expected more than 0")
        if wrong:
            raise ValueError("\n".join(wrong))
        self.every_n_steps, self.throughput = every_n_steps, throughput
        self.best = None if best is None else BestCheckpoint(best, best_mode)
        self.directory = CheckpointDirectory(directory, keep_last, keep_every_n_steps, keep_every_hours, self.best)
        self.cursor: dict[str, Any] | None = None  # the scheduler's state after the last consumed step
        self.boundary: Boundary | None = None  # kept where a validation may come before the next step ends
        self.writer = ThreadPoolExecutor(1)
        self.pending: Saving | None = None
        self.saved_step: int | None = None  # of the newest complete checkpoint of this run
        self.trained = False  # whether this process has made a step
        self.metrics: dict[str, Any] = {"step": 0, "tokens": 0, "loss": None, "validation": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if self.best is not None:
            check_metric(self.best.metric, "checkpoint.best", trainer)
        if trainer.is_global_zero:
            self.directory.prepare()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, InfiniModule)
        path = Path(str(trainer.ckpt_path))
        self.cursor = read_json(path / CURSOR)
        if self.cursor is not None:  # streamed data has no cursor and starts over
            trainer.datamodule.cursor = Cursor.from_dict(self.cursor)  # type: ignore[attr-defined]
        self.metrics = read_json(path / METRICS)
        if path.resolve().parent == self.directory.path.resolve():
            self.saved_step = step_of(path)
            if trainer.is_global_zero:
                self.directory.go_on_from(path)
        pl_module.lanes.load(path)
        rescale_batch_counters(checkpoint, trainer.accumulate_grad_batches, trainer.max_steps)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, InfiniModule)
        del checkpoint["state_dict"], checkpoint["optimizer_states"]  # these are in the fragments
        if trainer.validating:  # save as if validation had not begun, so that a resumed run repeats it
            assert self.boundary is not None
            checkpoint["loops"]["fit_loop"] = self.boundary.loops
        checkpoint |= parameter_table(trainer, pl_module)

    def on_step_end(self, trainer: Trainer, module: InfiniModule, batch: Batch) -> None:
        self.trained = True
        self.cursor = batch["cursor_after"]
        self.metrics["step"] = trainer.global_step
        self.metrics["tokens"] += batch["step_tokens"]
        self._keep_boundary(trainer, module)
        if self.pending is not None:  # commit the save in progress once every rank has written its files
            written = self.pending.written.done()
            if trainer.strategy.reduce_boolean_decision(written, all=True):
                self._finish(trainer)
        if trainer.global_step % self.every_n_steps == 0:
            self.save(trainer, module)
        if trainer.global_step < trainer.max_steps and preemption.agreed(trainer):
            self.leave(trainer, module)

    def _keep_boundary(self, trainer: Trainer, module: InfiniModule) -> None:
        self.boundary = None
        if validates_before_next_step(trainer):
            loops = copy.deepcopy(trainer.fit_loop.state_dict())
            self.boundary = Boundary(loops, module.lanes.groups(), module.step_loss)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.state.fn != "fit" or self.boundary is None or not preemption.agreed(trainer):
            return
        if trainer.global_step < trainer.max_steps:
            self.leave(trainer, pl_module)
        self.save_last(trainer, pl_module)  # the run ends with this validation; a kill must not undo the step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:  # a few batches only
            return
        values = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self.metrics["validation"] = {"step": trainer.global_step, **values}
        if trainer.state.fn != "fit":
            return
        if self.pending is not None and self.pending.metrics["step"] == trainer.global_step:
            self.pending.metrics["validation"] = self.metrics["validation"]
        elif self.saved_step == trainer.global_step:
            if trainer.is_global_zero:
                path = self.directory.of_step(trainer.global_step)
                self.directory.replace_metrics(path, self.metrics)
                self.directory.retain(path, self.metrics)
            trainer.strategy.barrier()
        if self.best is not None:
            self._keep_if_best(trainer, pl_module, self.best)

    def _keep_if_best(self, trainer: Trainer, pl_module: LightningModule, best: BestCheckpoint) -> None:
        """Save the step of the validation that has just ended, if it is the best one and is not saved yet."""
        try:
            improves = best.improves(self.metrics)
        except ValueError:
            self.save_last(trainer, pl_module)
            raise
        if not improves:
            return
        saving = self.pending is not None and self.pending.metrics["step"] == trainer.global_step
        if not saving and self.saved_step != trainer.global_step:
            if not self.trained:  # the checkpoint is another run's, from which this one begins
                return
            self.save(trainer, pl_module)
        best.taken(self.metrics)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, InfiniModule)
        if self.best is not None:
            self.best.start(trainer, self.directory.path, self.directory.own(trainer.global_step))
        elif trainer.is_global_zero:
            (self.directory.path / BEST).unlink(missing_ok=True)
        self._keep_boundary(trainer, pl_module)
        if preemption.agreed(trainer):  # the signal came while the run was starting
            self.leave(trainer, pl_module)
        # The earlier run may have ended before or during a validation that was due after its last step. Run it now.
        validated = (self.metrics["validation"] or {"step": 0})["step"]
        if validated != trainer.global_step and validates_now(trainer):
            loop = trainer.fit_loop.epoch_loop.val_loop
            loop.restarting = False  # start from its first batch
            trainer.validating = True
            loop.run()
            trainer.training = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save_last(trainer, pl_module)

    def leave(self, trainer: Trainer, pl_module: LightningModule) -> NoReturn:
        """Save the last step if it is not saved yet, and end the process of every rank."""
        self.save_last(trainer, pl_module)
        preemption.leave(trainer, latest(self.directory.path))

    def save_last(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Return only when the last step's checkpoint is complete, and is the latest one.

        A process that has made no step has nothing to save: what the run began from is in its record.
        """
        self._finish(trainer)
        if self.trained and self.saved_step != trainer.global_step:
            self.save(trainer, pl_module)
            self._finish(trainer)
        trainer.strategy.barrier()  # wait until rank 0 has moved `latest`

    def save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to save this step's checkpoint; all ranks must call this.

        Training waits until the state is copied in memory; only `_finish` waits until it is on disk.
        """
        assert isinstance(pl_module, InfiniModule)
        self._finish(trainer)
        begin = time.perf_counter()
        final = self.directory.of_step(trainer.global_step)
        partial = final.with_name(final.name + ".tmp")
        if trainer.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        trainer.strategy.barrier()
        boundary = self.boundary if trainer.validating else None
        step_loss = pl_module.step_loss if boundary is None else boundary.step_loss
        assert step_loss is not None
        self.metrics["loss"] = pl_module.sum_over_ranks(step_loss).item()
        small: dict[Path, bytes] = {}
        with _removed_if_it_fails(partial):
            trainer.save_checkpoint(partial)
            if trainer.is_global_zero:
                assert isinstance(trainer.strategy.checkpoint_io, DirectoryIO)
                small = {
                    partial / fragments.STATE: trainer.strategy.checkpoint_io.content,
                    partial / CURSOR: json.dumps(self.cursor).encode(),
                    partial / MODEL_CONFIG: pl_module.config.to_json_string(use_diff=False).encode(),
                    partial / CONFIG: (self.directory.path.parent / CONFIG).read_bytes(),
                }
        rank, world_size = trainer.global_rank, trainer.world_size
        zero = trainer.strategy.zero if isinstance(trainer.strategy, ZeroStrategy) else None
        optimizer = trainer.optimizers[0] if zero is None else zero.optimizer
        owned = fragments.owned(pl_module, zero, rank, world_size)
        files = {
            partial / fragments.file_name(rank, world_size): fragments.snapshot(owned, optimizer),
            partial / lane_memory.file_name(rank, world_size): pl_module.lanes.snapshot(boundary and boundary.lanes),
        }
        written = self.writer.submit(write_tensors, files, small)
        self.pending = Saving(written, partial, final, copy.deepcopy(self.metrics))
        pl_module.log_values({"speed/save_pause_seconds": time.perf_counter() - begin})

    def _finish(self, trainer: Trainer) -> None:
        """Wait until all ranks have written the save in progress, if any, and make it the latest checkpoint."""
        if self.pending is None:
            return
        saving, self.pending = self.pending, None
        with _removed_if_it_fails(saving.partial):
            written = saving.written.result()
        files = files_of_all_ranks(trainer, written)
        self.saved_step = step_of(saving.final)
        if trainer.is_global_zero:
            with _removed_if_it_fails(saving.partial):
                files[METRICS] = write_bytes(saving.partial / METRICS, json.dumps(saving.metrics).encode())
                self.directory.commit(saving.partial, saving.final, files)
            self.directory.retain(saving.final, saving.metrics)
        self.throughput.leave_out()


def files_of_all_ranks(trainer: Trainer, files: dict[str, FileSums]) -> dict[str, FileSums]:
    """Return the entries of all ranks together, once every rank has called this."""
    if trainer.world_size == 1:
        return files
    of_ranks: list[dict[str, FileSums]] = [{}] * trainer.world_size
    torch.distributed.all_gather_object(of_ranks, files)
    return {name: sums for entries in of_ranks for name, sums in entries.items()}


@contextmanager
def _removed_if_it_fails(directory: Path) -> Iterator[None]:
    """Remove the directory if the block raises: an incomplete checkpoint must not go on filling a full disk."""
    try:
        yield
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
