"""Warns of configurations that train without an error but leave parts of the memory untrained (docs/memory.md)."""

import numpy as np

from infini_train.model import InfiniConfig
from infini_train.model.rules import RULES

from .optim import OptimizerOptions


def known_failures(
    config: InfiniConfig,
    optimizer: OptimizerOptions,
    *,
    segments_per_window: int,
    write_cost: float,
    tokens_D: np.ndarray | None,
) -> list[str]:
    """Return a warning for each option that keeps the memory from learning: the option, what was found, and why.

    Args:
        config: configuration of the model.
        optimizer: options of the optimizer.
        segments_per_window: segments of one row in one micro-batch.
        write_cost: cost of writing, as in InfiniModule.
        tokens_D: lengths of the training documents in tokens, BOS and EOS included; None: not known.
    """
    rule = RULES[config.memory]
    found = rule.warnings(segments_per_window=segments_per_window, gate_lr=optimizer.gate_lr, write_cost=write_cost)
    size = config.segment_length
    short = 0.0 if tokens_D is None else float(tokens_D[tokens_D <= size].sum() / tokens_D.sum())
    if short > 0.5:
        found.append(
            f"data.segment_length: found {size}, and {short:.0%} of the training tokens in documents no longer than "
            "that, which local attention sees whole: they never ask for the memory; documents of several segments "
            "do, or a shorter segment"
        )
    return [f"{line}; see docs/memory.md" for line in found]
