"""Options and callbacks of Lightning's Trainer that cannot work here, each with the reason."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning import Callback
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Checkpoint,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy

from .strategy import ZeroStrategy, is_ddp

# The values that an option may have, and what to use instead.
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "fast_dev_run": ((False,), "use --trainer.max_steps 1 and another --run"),
    "max_epochs": ((-1, None), "training is one endless epoch; use max_steps"),
    "min_epochs": ((None,), "training is one endless epoch; use max_steps"),
    "overfit_batches": ((0,), "lanes never start over; use a small dataset"),
    "limit_test_batches": ((None,), "nothing is tested"),
    "limit_predict_batches": ((None,), "nothing is predicted"),
    "check_val_every_n_epoch": ((None,), "training is one endless epoch; use val_check_interval"),
    "enable_checkpointing": ((None, True), "every run has checkpoints; see --checkpoint.every_n_steps"),
    "use_distributed_sampler": ((False,), "rows are shared out among ranks already"),
    "barebones": ((False,), "it turns off the callbacks that training needs"),
    "sync_batchnorm": ((False,), "the model has no batch normalization"),
    "reload_dataloaders_every_n_epochs": ((0,), "lanes never start over"),
    "default_root_dir": ((None,), "use --run"),
    "model_registry": ((None,), "checkpoints are not uploaded"),
}
LEAST = {
    "gradient_clip_val": 0,
    "log_every_n_steps": 1,
    "accumulate_grad_batches": 1,
    "val_check_interval": 1,
    "num_sanity_val_steps": -1,
    "min_steps": 0,
}
CHECKPOINTS = "the state of a run is saved by the options of --checkpoint, and never otherwise"
CALLBACKS: dict[type[Callback], str] = {
    Checkpoint: CHECKPOINTS,
    WeightAveraging: "checkpoints would not hold the average; use --model.optimizer.ema_decay",
    StochasticWeightAveraging: "it averages over epochs, and training is one endless epoch; "
    "use --model.optimizer.ema_decay",
    GradientAccumulationScheduler: "the number of lanes is fixed; use --trainer.accumulate_grad_batches",
    LearningRateFinder: CHECKPOINTS,
    BatchSizeFinder: CHECKPOINTS,
    BaseFinetuning: "it changes the optimizer's parameter groups, which checkpoints describe",
    ModelPruning: "it puts other parameters in the place of the model's",
}


def unusable_options(seed_everything: bool | int, trainer: Mapping[str, Any]) -> list[str]:
    """Return a message for each option that would have no effect, or an effect that training does not survive.

    Args:
        seed_everything: the option of this name.
        trainer: the options of the trainer, by name.
    """
    wrong = []
    if seed_everything is not False:
        wrong.append(
            f"seed_everything: found {seed_everything}, expected false: model.seed is the seed of the weights and of "
            "memory_dropout, data.seed that of the order of documents"
        )
    for name, (allowed, instead) in FIXED.items():
        if (found := trainer.get(name, allowed[0])) not in allowed:
            wrong.append(f"trainer.{name}: found {found}, expected {allowed[0]}: {instead}")
    for name, least in LEAST.items():
        found = trainer.get(name)
        if isinstance(found, int | float) and not least <= found < math.inf:
            wrong.append(f"trainer.{name}: found {found}, expected at least {least}")
    interval = trainer.get("val_check_interval")
    if interval is not None and not isinstance(interval, int | float):
        wrong.append(f"trainer.val_check_interval: found {interval}, expected a number of micro-batches")
    return wrong


def unusable_callbacks(callbacks: Sequence[Callback]) -> list[str]:
    """Return a message for each callback of Lightning that cannot work here."""
    return [
        f"trainer.callbacks: found {type(callback).__name__}, expected none of this kind: {reason}"
        for callback in callbacks
        for kind, reason in CALLBACKS.items()
        if isinstance(callback, kind)
    ]


def unusable_strategy(given: Any, strategy: Strategy) -> str | None:
    """Return a message for a strategy that cannot work here; None: it can.

    Args:
        given: the option.
        strategy: what the trainer has made of it.
    """
    reason = "checkpoints do not know where another one holds weights and optimizer state"
    if isinstance(strategy, SingleDeviceStrategy | ZeroStrategy):
        return None
    if is_ddp(strategy):
        if strategy._start_method == "popen":
            return None
        reason = "a rank is not started as a copy of another one"
    return f"trainer.strategy: found {given}, expected auto, ddp, zero1, zero2 or zero3: {reason}"
