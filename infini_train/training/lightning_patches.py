"""All code that patches Lightning or depends on its internals (written against version 2.6)."""

import logging
import warnings
from typing import TYPE_CHECKING, Any

from lightning_utilities.core import imports as requirements

if TYPE_CHECKING:
    from lightning import Trainer


def import_torchmetrics() -> None:
    """Import torchmetrics, which Lightning needs, without the packages of metrics that nothing here uses.

    Its plots import matplotlib, its text metrics all of transformers' automatic classes (0.4 s of every start), and
    its metrics of sound scipy.signal (0.4 s where scipy is installed). It must be called before Lightning is.
    """
    check, available = requirements.RequirementCache._check_available, requirements.package_available

    def check_few(requirement: requirements.RequirementCache) -> None:
        if requirement.requirement in ("matplotlib", "transformers>=4.4.0", "scipy"):
            requirement.available, requirement.message = False, "infini-train imports torchmetrics without it"
        else:
            check(requirement)

    requirements.RequirementCache._check_available = check_few  # type: ignore[method-assign,assignment]
    requirements.package_available = lambda name: name != "scipy" and available(name)  # type: ignore[assignment]
    try:
        import torchmetrics  # noqa: F401
    finally:
        requirements.RequirementCache._check_available = check  # type: ignore[method-assign]
        requirements.package_available = available


def silence() -> None:
    """Suppress Lightning's advertisements, and warnings that do not apply here."""
    # The loader does resume exactly, by its cursor, and logged values have already been summed over ranks.
    for pattern in (
        ".*torch.distributed.* is deprecated.*",  # called by DeepSpeed
        ".*sync_dist=True.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*overridden `transfer_batch_to_device`.*",
        ".*is not resumable.*",
        ".*callbacks used to create the checkpoint need to be provided.*",  # `validate` has not those of training
    ):
        warnings.filterwarnings("ignore", pattern)
    warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # no validation data
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def replace_signal_handling(trainer: "Trainer") -> None:
    """Disable Lightning's handling of SIGTERM; `infini_train.preemption` does it instead.

    Lightning's handler calls a broadcast, which deadlocks, and every micro-batch waits for another broadcast.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def keep_gradient_buckets(trainer: "Trainer") -> None:
    """Let DDP sum gradients over more than two ranks in one order, so that a resumed run has the unbroken one's bits.

    DDP arranges gradients in buckets anew after the first step of a process, which changes the order in which the
    ranks' shares of a gradient are added. It does not where it looks for unused parameters.
    """
    from .strategy import is_ddp

    strategy = trainer.strategy
    if is_ddp(strategy) and trainer.world_size > 2:
        strategy._ddp_kwargs.setdefault("find_unused_parameters", True)


def stop_between_steps() -> None:
    """Let `trainer.should_stop` (of max_time, EarlyStopping) end a run only where an optimizer step has ended.

    Lightning ends it after the current micro-batch, whose gradients and memories no checkpoint could hold.
    """
    from lightning.pytorch.loops.fit_loop import _FitLoop

    may_stop = vars(_FitLoop)["_can_stop_early"].fget

    def between_steps(loop: _FitLoop) -> bool:
        return bool(may_stop(loop)) and loop.epoch_loop._accumulated_batches_reached()

    _FitLoop._can_stop_early = property(between_steps)  # type: ignore[assignment,method-assign]


def start_a_finished_run() -> None:
    """Let a run that has done all of its steps start and end as every other run does, so that
    `Checkpointer.on_train_start` can make up for a validation that was cut off after the last step.

    Lightning would return before it.
    """
    from lightning.pytorch.loops.fit_loop import _FitLoop

    def has_no_batches(loop: _FitLoop) -> bool:
        return loop.trainer.limit_train_batches == 0 or loop.max_batches == 0

    _FitLoop.skip = property(has_no_batches)  # type: ignore[assignment,method-assign]


def validates_now(trainer: "Trainer") -> bool:
    """Return whether a validation follows the last trained micro-batch."""
    done, interval = trainer.fit_loop.epoch_loop.total_batch_idx + 1, trainer.val_check_batch
    return bool(trainer.enable_validation and interval and done > 0 and done % interval == 0)


def validates_before_next_step(trainer: "Trainer") -> bool:
    """Return whether a validation may come after the last trained micro-batch and before the next step ends."""
    if not trainer.enable_validation:
        return False
    interval = trainer.val_check_batch
    if interval is None:  # a time: it may be over at any moment
        return True
    first = trainer.fit_loop.epoch_loop.total_batch_idx + 1
    last = first + trainer.accumulate_grad_batches - 1  # one micro-batch less than the next step has
    return interval > 0 and last // interval > (first - 1) // interval


def rescale_batch_counters(checkpoint: dict[str, Any], accumulate: int, max_steps: int) -> None:
    """Rescale Lightning's micro-batch counters in a checkpoint if accumulate_grad_batches has changed since.

    Args:
        checkpoint: the loaded checkpoint, which is changed in place.
        accumulate: micro-batches of an optimizer step in this run.
        max_steps: optimizer steps of this run.
    """
    before = checkpoint["accumulate_grad_batches"]
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        ready = counts["ready"]
        for field, count in counts.items():
            counts[field] = ready // before * accumulate - (ready - count)
    # If the earlier run ended here but this one has more steps to do, Lightning must not end its epoch.
    progress["is_last_batch"] &= checkpoint["global_step"] >= max_steps
