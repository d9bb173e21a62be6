"""Saves and restores the checkpoints of a run, and removes old ones. checkpoint_format.py describes the format.

A save has two parts. While training waits, every rank copies its weights, optimizer state and memories to the CPU
(`Checkpointer.save`). A thread then writes the copies and reads them back while training goes on. At the end of a
later step, when all ranks have finished writing, rank 0 makes the directory the latest checkpoint (`_commit`). A
checkpoint is always of the end of an optimizer step, because gradients accumulated so far are not stored. A
validation may come in the middle of a step (`Boundary`).
"""

import copy
import io
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO

from infini_train import preemption
from infini_train.data.batches import Batch
from infini_train.data.lanes import Cursor
from infini_train.files import sync, write_file, xxh3_of_file
from infini_train.model.memory_rule import MemoryState
from infini_train.run_files import (
    BEST,
    COMPLETE,
    CONFIG,
    CURSOR,
    LATEST,
    METRICS,
    MODEL_CONFIG,
    FileSums,
    complete,
    files_of,
    is_checkpoint_name,
    latest,
    point_to,
    read_json,
    read_record,
    step_of,
    write_record,
)

from . import fragments, lane_memory
from .best import BestCheckpoint
from .checkpoint_format import read_back, state_dict, verify, write_bytes, write_tensors
from .lightning_patches import rescale_batch_counters, validates_before_next_step, validates_now
from .module import InfiniModule, StepCallback
from .optim import parameter_groups
from .strategy import ZeroStrategy


def describe(trainer: Trainer, module: InfiniModule) -> dict[str, Any]:
    """Return what a checkpoint has to say about the parameters whose fragments it holds (fragments.py).

    Returns:
        `parameters`: shape of each parameter by name; `tied`: for each name that shares its tensor with another
        parameter, the name of the other; `groups`: options of the parameter groups and the names in each;
        `accumulate_grad_batches`.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    everything = module.named_parameters(remove_duplicate=False)
    groups = zip(trainer.optimizers[0].param_groups, parameter_groups(module, module.options), strict=True)
    return {
        "parameters": {n: list(getattr(p, "ds_shape", p.shape)) for n, p in module.named_parameters()},
        "tied": {name: names[id(p)] for name, p in everything if name != names[id(p)]},
        "groups": [
            {**{k: v for k, v in now.items() if k != "params"}, "params": [names[id(p)] for p in made["params"]]}
            for now, made in groups
        ],
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
    }


class DirectoryIO(CheckpointIO):
    """Reads and writes checkpoint directories under strategies in which every rank holds the whole state.

    Lightning passes the checkpoint as one dictionary. Weights and optimizer state are in the fragments instead, which
    `Checkpointer` writes, and `load_checkpoint` puts them back into the dictionary.

    Attributes:
        content: what `save_checkpoint` was given last, as the bytes of the file STATE, which the writing thread
            writes.
    """

    content: bytes

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        self.content = buffer.getvalue()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        state = fragments.read_state(Path(path))
        # torch's optimizer state numbers the parameters across all groups, while the checkpoint names them.
        groups: list[dict[str, Any]] = []
        numbers: dict[str, int] = {}
        for group in state["groups"]:
            first = len(numbers)
            numbers |= {name: first + i for i, name in enumerate(group["params"])}
            groups.append({**group, "params": [numbers[name] for name in group["params"]]})
        with fragments.Fragments(Path(path)) as saved:
            state["state_dict"] = state_dict(saved, state)
            states = {
                number: {
                    kind: saved.whole(kind, name, state["parameters"][name]) for kind in saved.optimizer_kinds(name)
                }
                for name, number in numbers.items()
            }
        state["optimizer_states"] = [{"state": {i: x for i, x in states.items() if x}, "param_groups": groups}]
        return state

    def remove_checkpoint(self, path: Any) -> None:
        raise AssertionError("checkpoints are removed by Checkpointer")


class Verifier(Callback):
    """Compares all files of the checkpoint that is loaded with their digests; every rank reads its share of them.

    Args:
        path: the checkpoint.
    """

    def __init__(self, path: Path):
        self.path = path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        verify(self.path, trainer.global_rank, trainer.world_size)
        trainer.strategy.barrier()


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
    """Saves and restores the checkpoints of a run, and removes old ones.

    Args:
        directory: the run's `checkpoints` directory.
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
        self.directory, self.every_n_steps, self.keep_last = directory, every_n_steps, keep_last
        self.keep_every_n_steps, self.keep_every_hours = keep_every_n_steps, keep_every_hours
        self.best = None if best is None else BestCheckpoint(best, best_mode)
        self.cursor: dict[str, Any] | None = None  # the scheduler's state after the last consumed step
        self.boundary: Boundary | None = None  # kept where a validation may come before the next step ends
        self.writer = ThreadPoolExecutor(1)
        self.pending: Saving | None = None
        self.saved_step: int | None = None  # of the newest complete checkpoint of this run
        self.trained = False  # whether this process has made a step
        self.foreign: set[Path] = set()  # checkpoints in the directory that this run has not written
        self.metrics: dict[str, Any] = {"step": 0, "tokens": 0, "loss": None, "validation": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if self.best is not None:
            self.best.check(trainer)
        if not trainer.is_global_zero:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.iterdir():  # from a save or removal that was interrupted
            name = leftover.name.removesuffix(".tmp").removesuffix(".removed")
            if leftover.suffix == ".tmp" and is_checkpoint_name(name) and not leftover.is_symlink():
                shutil.rmtree(leftover)
            elif any(leftover.match(f".{pointer}.*.tmp") for pointer in (LATEST, BEST)):
                leftover.unlink()
        saved = read_record(self.directory.parent)["saved"]
        there = complete(self.directory)
        self.foreign = {path for path in there if saved.get(path.name) != xxh3_of_file(path / COMPLETE)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, InfiniModule)
        path = Path(str(trainer.ckpt_path))
        self.cursor = read_json(path / CURSOR)
        if self.cursor is not None:  # streamed data has no cursor and starts over
            trainer.datamodule.cursor = Cursor.from_dict(self.cursor)  # type: ignore[attr-defined]
        self.metrics = read_json(path / METRICS)
        if path.resolve().parent == self.directory.resolve():
            self.saved_step = step_of(path)
        pl_module.lanes.load(path)
        rescale_batch_counters(checkpoint, trainer.accumulate_grad_batches, trainer.max_steps)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, InfiniModule)
        del checkpoint["state_dict"], checkpoint["optimizer_states"]  # these are in the fragments
        if trainer.validating:  # save as if validation had not begun, so that a resumed run repeats it
            assert self.boundary is not None
            checkpoint["loops"]["fit_loop"] = self.boundary.loops
        checkpoint |= describe(trainer, pl_module)

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
                self._add_validation(self.path(trainer.global_step))
                self._retain(self.path(trainer.global_step), self.metrics)
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
            self.best.start(trainer, self.directory, self._own(trainer.global_step))
        elif trainer.is_global_zero:
            (self.directory / BEST).unlink(missing_ok=True)
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
        preemption.leave(trainer, latest(self.directory))

    def save_last(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Return only when the last step's checkpoint is complete, and is the latest one.

        A process that has made no step has nothing to save: what the run began from is in its record.
        """
        self._finish(trainer)
        if self.trained and self.saved_step != trainer.global_step:
            self.save(trainer, pl_module)
            self._finish(trainer)
        trainer.strategy.barrier()  # wait until rank 0 has moved `latest`

    def path(self, step: int) -> Path:
        """Return the directory of a step's checkpoint."""
        return self.directory / f"step-{step:08d}"

    def save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to save this step's checkpoint; all ranks must call this.

        Training waits until the state is copied in memory; only `_finish` waits until it is on disk.
        """
        assert isinstance(pl_module, InfiniModule)
        self._finish(trainer)
        begin = time.perf_counter()
        final = self.path(trainer.global_step)
        partial = final.with_name(final.name + ".tmp")
        if trainer.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        trainer.strategy.barrier()
        boundary = self.boundary if trainer.validating else None
        step_loss = pl_module.step_loss if boundary is None else boundary.step_loss
        assert step_loss is not None
        self.metrics["loss"] = pl_module.mean_over_ranks(step_loss).item()
        small: dict[Path, bytes] = {}
        with _removed_if_it_fails(partial):
            trainer.save_checkpoint(partial)
            if trainer.is_global_zero:
                assert isinstance(trainer.strategy.checkpoint_io, DirectoryIO)
                small = {
                    partial / fragments.STATE: trainer.strategy.checkpoint_io.content,
                    partial / CURSOR: json.dumps(self.cursor).encode(),
                    partial / MODEL_CONFIG: pl_module.config.to_json_string(use_diff=False).encode(),
                    partial / CONFIG: (self.directory.parent / CONFIG).read_bytes(),
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
        files = gathered(trainer, written)
        self.saved_step = step_of(saving.final)
        if trainer.is_global_zero:
            with _removed_if_it_fails(saving.partial):
                files[METRICS] = write_bytes(saving.partial / METRICS, json.dumps(saving.metrics).encode())
                self._commit(saving.partial, saving.final, files)
            self._retain(saving.final, saving.metrics)

    def _commit(self, partial: Path, final: Path, files: dict[str, FileSums]) -> None:
        """Make the directory `partial`, which all ranks have written, the latest checkpoint `final`.

        Each of these is on disk before the next is written: the files, COMPLETE, the run's record of what it has
        written, the directory's final name, and `latest`. A crash between any two of them leaves a complete
        checkpoint as the latest.

        Args:
            partial, final: the directory, and the name that it gets.
            files: size and digest of each file in it.

        Raises:
            OSError: the files that this process finds are not those that the ranks have written.
        """
        self._mark(partial, final.name, files)
        read_back(partial, step_of(final))
        replaced = self._put_aside(final) if final.exists() else None
        os.rename(partial, final)
        sync(self.directory)
        point_to(final, LATEST)
        if replaced is not None:
            shutil.rmtree(replaced)

    def _put_aside(self, path: Path) -> Path | None:
        """Rename a checkpoint whose step the run has reached again, because it was resumed from an older one.

        Returns:
            the new name, if the run has written this checkpoint and may remove it.
        """
        if path not in self.foreign:
            removed = path.with_name(path.name + ".removed.tmp")
            os.rename(path, removed)
            return removed
        self.foreign.remove(path)
        kept = (path.with_name(f"{path.name}.replaced-{number}") for number in itertools.count(1))
        os.rename(path, next(name for name in kept if not name.exists()))
        return None

    def _mark(self, directory: Path, name: str, files: dict[str, FileSums]) -> None:
        """Write COMPLETE, and record that this run has written the checkpoint `name`."""
        sums = {file: [about["size"], about["xxh3"]] for file, about in sorted(files.items())}
        write_file(directory / COMPLETE, json.dumps(sums, separators=(",", ":")).encode())
        record = read_record(self.directory.parent)
        there = {path.name for path in complete(self.directory)}
        record["saved"] = {saved: digest for saved, digest in record["saved"].items() if saved in there}
        record["saved"][name] = xxh3_of_file(directory / COMPLETE)
        write_record(self.directory.parent, record)

    def _add_validation(self, path: Path) -> None:
        """Put the result of the last validation into this run's checkpoint `path`, which is complete at any time."""
        files = files_of(path)
        del files[METRICS]  # until COMPLETE has the new digest, a crash leaves METRICS unlisted, but whole
        self._mark(path, path.name, files)
        content = json.dumps(self.metrics).encode()
        write_file(path / METRICS, content)
        files[METRICS] = FileSums(size=len(content), xxh3=xxh3_of_file(path / METRICS))
        self._mark(path, path.name, files)

    def _own(self, step: int) -> list[Path]:
        """Return the run's own complete checkpoints up to this step, by step."""
        own = [path for path in complete(self.directory) if path not in self.foreign]
        return [path for path in own if step_of(path) <= step]

    def _retain(self, newest: Path, metrics: dict[str, Any]) -> None:
        """Remove the run's own checkpoints that no option keeps. Those of later steps than `newest` stay.

        Args:
            newest: a complete checkpoint, which becomes the best one first if it is.
            metrics: content of its METRICS.
        """
        if self.best is not None:
            self.best.completed(newest, metrics)
        last_kept = -math.inf  # when the newest checkpoint that keep_every_hours keeps was written
        for path in self._own(step_of(newest))[: -self.keep_last]:
            if self.best is not None and path == self.best.path:
                continue
            written = (path / COMPLETE).stat().st_mtime
            if self.keep_every_hours and written - last_kept >= 3600 * self.keep_every_hours:
                last_kept = written
            elif not self.keep_every_n_steps or step_of(path) % self.keep_every_n_steps:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint, renamed first, so that a directory with a checkpoint's name is always complete.

        The new name is on disk before the first file goes, or a power cut could bring the old name back.
        """
        removed = path.with_name(path.name + ".removed.tmp")
        os.rename(path, removed)
        sync(self.directory)
        shutil.rmtree(removed)


def gathered(trainer: Trainer, files: dict[str, FileSums]) -> dict[str, FileSums]:
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
