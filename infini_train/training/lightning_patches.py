"""Everything that depends on Lightning's internals, or mends them, in one place (written against 2.6)."""

import logging
import warnings
from typing import TYPE_CHECKING, Any

from lightning_utilities.core import imports as requirements

if TYPE_CHECKING:
    from lightning import Trainer


def import_torchmetrics() -> None:
    """Import torchmetrics, which Lightning needs, without the packages of metrics that nothing here uses.

    Its plots import matplotlib, and its text metrics all of transformers' automatic classes: 0.4 s of every start.
    It must be called before Lightning is imported.
    """
    check = requirements.RequirementCache._check_available

    def check_few(requirement: requirements.RequirementCache) -> None:
        if requirement.requirement in ("matplotlib", "transformers>=4.4.0"):
            requirement.available, requirement.message = False, "infini-train imports torchmetrics without it"
        else:
            check(requirement)

    requirements.RequirementCache._check_available = check_few  # type: ignore[method-assign,assignment]
    try:
        import torchmetrics  # noqa: F401
    finally:
        requirements.RequirementCache._check_available = check  # type: ignore[method-assign]


def silence() -> None:
    """Leave out Lightning's advertisements, and warnings that do not hold here."""
    # The loader resumes exactly, by cursor, and what is logged has been summed over ranks already.
    for pattern in (
        ".*torch.distributed.* is deprecated.*",  # DeepSpeed's calls
        ".*sync_dist=True.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*overridden `transfer_batch_to_device`.*",
        ".*is not resumable.*",
    ):
        warnings.filterwarnings("ignore", pattern)
    warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # no validation data
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def replace_signal_handling(trainer: "Trainer") -> None:
    """Lightning's handler of SIGTERM broadcasts, and deadlocks; every micro-batch waits for a second broadcast."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def validates_now(trainer: "Trainer") -> bool:
    """Whether the micro-batch that was last trained is followed by a validation."""
    done, interval = trainer.fit_loop.epoch_loop.total_batch_idx + 1, trainer.val_check_batch
    return bool(trainer.enable_validation and interval and done > 0 and done % interval == 0)


def count_for(checkpoint: dict[str, Any], accumulate: int, max_steps: int) -> None:
    """Lightning counts micro-batches; count the same steps in those of this run."""
    before = checkpoint["accumulate_grad_batches"]
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        ready = counts["ready"]
        for field, count in counts.items():
            counts[field] = ready // before * accumulate - (ready - count)
    # The last one of a run that had fewer steps to do: Lightning would end an epoch there.
    progress["is_last_batch"] &= checkpoint["global_step"] >= max_steps
