"""Saves and restores the checkpoints of a run, and removes old ones. checkpoint_format.py describes the format.

A save has two parts. While training waits, every rank copies its weights, optimizer state and memories to the CPU,
and the small files are written (`Checkpointer.save`). A thread then writes the copies while training goes on. At the
end of a later step, when all ranks have finished writing, rank 0 makes the directory the latest checkpoint
(`_commit`). Checkpoints are taken between optimizer steps only, because gradients accumulated so far are not stored.
"""

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO

from infini_train import preemption
from infini_train.data.batches import Batch
from infini_train.data.lanes import Cursor
from infini_train.files import atomic_file, sync
from infini_train.run_files import COMPLETE, CONFIG, CURSOR, LATEST, METRICS, MODEL_CONFIG

from . import fragments, lane_memory
from .checkpoint_format import latest, not_written, state_dict, step_of, write_tensors
from .lightning_patches import rescale_batch_counters, validates_now
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
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        file = Path(path) / fragments.STATE
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch reports a full disk this way
            raise not_written(file, error) from error

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


class Checkpointer(StepCallback, Checkpoint):
    """Saves and restores the checkpoints of a run, and removes old ones.

    Args:
        directory: the run's `checkpoints` directory.
        every_n_steps: optimizer steps between checkpoints; another one is written at the end of training.
        keep_last: number of newest checkpoints to keep.
        keep_every_n_steps: keep checkpoints whose step is a multiple of this for good; none: keep only the newest.
        keep_every_hours: keep one checkpoint per this many hours for good; none: keep only the newest.

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
        self.cursor: dict[str, Any] | None = None  # the scheduler's state after the last consumed step
        self.loops: dict[str, Any] | None = None  # Lightning's counters when the validation in progress began
        self.writer = ThreadPoolExecutor(1)
        # A save in progress: the writing thread's future, the directory it writes to, and its final name.
        self.pending: tuple[Future, Path, Path] | None = None
        self.metrics: dict[str, Any] = {"step": 0, "tokens": 0, "loss": None, "validation": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob("*.tmp"):  # from a save or removal that was interrupted
                is_link = leftover.is_symlink()  # not ours; what it points to stays
                shutil.rmtree(leftover) if leftover.is_dir() and not is_link else leftover.unlink()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, InfiniModule)
        path = Path(str(trainer.ckpt_path))
        self.cursor = json.loads((path / CURSOR).read_text())
        if self.cursor is not None:  # streamed data has no cursor and starts over
            trainer.datamodule.cursor = Cursor.from_dict(self.cursor)  # type: ignore[attr-defined]
        self.metrics = json.loads((path / METRICS).read_text())
        pl_module.lanes.load(path)
        rescale_batch_counters(checkpoint, trainer.accumulate_grad_batches, trainer.max_steps)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, InfiniModule)
        del checkpoint["state_dict"], checkpoint["optimizer_states"]  # these are in the fragments
        if trainer.validating:  # save as if validation had not begun, so that a resumed run repeats it
            checkpoint["loops"]["fit_loop"] = self.loops
        checkpoint |= describe(trainer, pl_module)

    def on_step_end(self, trainer: Trainer, module: InfiniModule, batch: Batch) -> None:
        self.cursor = batch["cursor_after"]
        self.metrics["step"] = trainer.global_step
        self.metrics["tokens"] += batch["step_tokens"]
        if self.pending is not None:  # commit the save in progress once every rank has written its files
            written = self.pending[0].done()
            if trainer.strategy.reduce_boolean_decision(written, all=True):
                self._finish(trainer)
        if trainer.global_step % self.every_n_steps == 0:
            self.save(trainer, module)
        if trainer.global_step < trainer.max_steps and preemption.agreed(trainer):
            self.leave(trainer, module)
        self.loops = copy.deepcopy(trainer.fit_loop.state_dict()) if validates_now(trainer) else None

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.state.fn == "fit" and preemption.agreed(trainer):
            self.leave(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self.metrics["validation"] = {"step": trainer.global_step, **values}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
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
        """Return only when the last step's checkpoint is complete, and is the latest one."""
        self._finish(trainer)
        trainer.strategy.barrier()  # wait until rank 0 has moved `latest`
        if trainer.global_step and latest(self.directory) != self.path(trainer.global_step):
            self.save(trainer, pl_module)
            self._finish(trainer)
            trainer.strategy.barrier()

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
        if pl_module.step_loss is not None:  # None if a run is resumed at its last step and has nothing to train
            self.metrics["loss"] = pl_module.mean_step_loss().item()
        with _removed_if_it_fails(partial):
            trainer.save_checkpoint(partial)
            if trainer.is_global_zero:
                (partial / CURSOR).write_text(json.dumps(self.cursor))
                (partial / METRICS).write_text(json.dumps(self.metrics))
                (partial / MODEL_CONFIG).write_text(pl_module.config.to_json_string(use_diff=False))
                shutil.copyfile(self.directory.parent / CONFIG, partial / CONFIG)
        rank, world_size = trainer.global_rank, trainer.world_size
        zero = trainer.strategy.zero if isinstance(trainer.strategy, ZeroStrategy) else None
        optimizer = trainer.optimizers[0] if zero is None else zero.optimizer
        owned = fragments.owned(pl_module, zero, rank, world_size)
        files = {
            partial / fragments.file_name(rank, world_size): fragments.snapshot(owned, optimizer),
            partial / lane_memory.file_name(rank, world_size): pl_module.lanes.snapshot(),
        }
        self.pending = self.writer.submit(write_tensors, files), partial, final
        pl_module.log_values({"speed/save_pause_seconds": time.perf_counter() - begin})

    def _finish(self, trainer: Trainer) -> None:
        """Wait until all ranks have written the save in progress, if any, and make it the latest checkpoint."""
        if self.pending is None:
            return
        (written, partial, final), self.pending = self.pending, None
        with _removed_if_it_fails(partial):
            written.result()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            self._commit(partial, final)

    def _commit(self, partial: Path, final: Path) -> None:
        """Make the directory `partial`, which all ranks have written, the latest checkpoint `final`.

        Each of these is on disk before the next is written: the files, COMPLETE, the directory's final name, and
        `latest`. A crash between any two of them leaves a complete checkpoint as the latest.
        """
        files = sorted(f for f in partial.rglob("*") if f.is_file())
        for file in files:
            sync(file)
        sizes = {str(f.relative_to(partial)): f.stat().st_size for f in files}
        (partial / COMPLETE).write_text(json.dumps(sizes))
        sync(partial / COMPLETE)
        sync(partial)
        if final.exists():  # the run was resumed from an older checkpoint and has reached this step again
            self._remove(final)
        os.rename(partial, final)
        sync(self.directory)
        with atomic_file(self.directory / LATEST) as pointer:
            pointer.write(final.name.encode())
        self._retain(final)

    def _retain(self, newest: Path) -> None:
        """Remove the checkpoints that no option keeps. Checkpoints of later steps than `newest` stay."""
        steps = [p for p in sorted(self.directory.glob("step-*")) if p.suffix != ".tmp" and p <= newest]
        last_kept = -math.inf  # when the newest checkpoint that keep_every_hours keeps was written
        for path in steps[: -self.keep_last]:
            written = (path / COMPLETE).stat().st_mtime
            if self.keep_every_hours and written - last_kept >= 3600 * self.keep_every_hours:
                last_kept = written
            elif not self.keep_every_n_steps or step_of(path) % self.keep_every_n_steps:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint, renamed first, so that a directory with a checkpoint's name is always complete."""
        removed = path.with_name(path.name + ".removed.tmp")
        os.rename(path, removed)
        shutil.rmtree(removed)


@contextmanager
def _removed_if_it_fails(directory: Path) -> Iterator[None]:
    """Remove the directory if the block raises: an incomplete checkpoint must not go on filling a full disk."""
    try:
        yield
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
