"""Warns of configurations that train without an error but are known to leave the memory unused (docs/memory.md)."""

import numpy as np

from infini_train.model import InfiniConfig

from .optim import OptimizerOptions

READ = "see docs/memory.md"


def known_failures(
    config: InfiniConfig, optimizer: OptimizerOptions, *, segments_per_window: int, tokens_D: np.ndarray | None
) -> list[str]:
    """Return a warning for each reason why the memory cannot learn: the option, what was found, and what works.

    Args:
        config: configuration of the model.
        optimizer: options of the optimizer.
        segments_per_window: segments of one row in one micro-batch.
        tokens_D: lengths of the training documents in tokens, BOS and EOS included; None: not known.
    """
    selective = config.memory == "selective-delta"
    found = []
    if segments_per_window == 1:
        unlearned = ", nor do write strengths, forgetting and convolved keys get any" if selective else ""
        found.append(
            "data.segments_per_window: found 1, 16 works: gradients end at the window, so none asks a segment to "
            f"write what a later one reads{unlearned}; {READ}"
        )
    if optimizer.gate_lr == 0:
        kept = "gates, write strengths and forgetting stay" if selective else "gates stay"
        found.append(f"model.optimizer.gate_lr: found 0, 0.01 works: {kept} as they began; {READ}")
    size = config.segment_length
    short = 0.0 if tokens_D is None else float(tokens_D[tokens_D <= size].sum() / tokens_D.sum())
    if short > 0.5:
        found.append(
            f"data.segment_length: found {size}, and {short:.0%} of the training tokens in documents no longer than "
            "that, which local attention sees whole: nothing asks for the memory; documents of several segments "
            f"work, or a shorter segment; {READ}"
        )
    return found
