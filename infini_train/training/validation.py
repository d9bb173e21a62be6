"""What a validation measures: losses by the segment's number in its document, with the memory on and off."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from lightning import Trainer
from rich.table import Table
from torch import Tensor

from infini_train.data.batches import IGNORED, Batch
from infini_train.data.datamodule import LaneDataModule
from infini_train.metrics.buckets import BUCKETS, bucket_name, bucket_of

KINDS = r"loss|memory_benefit|recall|recall_memory_off|segment_\d+(-\d+)?(_memory_off)?"


class SegmentLosses:
    """Sums the losses of a validation's batches, for each dataset.

    Args:
        names: names of the datasets, in the order of their loaders; the only one may have the empty name.
        segment_length: tokens of a segment.

    Attributes:
        losses: float64 [datasets, 2, BUCKETS] on the CPU, sums of losses in nats with the memory on and off,
            by buckets of the segment's number in its document.
        tokens: float64 [datasets, BUCKETS] on the CPU, numbers of labels.
    """

    def __init__(self, names: list[str], segment_length: int):
        self.names, self.segment_length = names, segment_length
        self.losses = torch.zeros(len(names), 2, BUCKETS, dtype=torch.float64, device="cpu")
        self.tokens = torch.zeros(len(names), BUCKETS, dtype=torch.float64, device="cpu")

    def add(self, dataset: int, batch: Batch, on_BT: Tensor, off_BT: Tensor) -> None:
        """Add a batch of the dataset of this number, and its tokens' losses with the memory on and off."""
        # Segments of padding have number -1. They have no labels, so it does not matter to which bucket they go.
        segments = batch["segment_index"].clamp_min(0).flatten().tolist()
        buckets = torch.tensor([bucket_of(segment) for segment in segments])
        for row, losses_BT in enumerate((on_BT, off_BT)):
            self.losses[dataset, row].index_add_(0, buckets, self._of_segments(losses_BT))
        self.tokens[dataset].index_add_(0, buckets, self._of_segments(batch["labels"] != IGNORED))

    def _of_segments(self, values_BT: Tensor) -> Tensor:
        return values_BT.unflatten(1, (-1, self.segment_length)).sum(-1).flatten().cpu().double()

    def results(self) -> Iterator[tuple[dict[str, float], Table]]:
        """Yield the metrics of each dataset and, if they have names, of all together; and a table of them."""
        sums = list(zip(self.names, self.losses, self.tokens, strict=True))
        if self.names != [""]:  # the loss over the tokens of all datasets
            sums.append(("", self.losses.sum(0), self.tokens.sum(0)))
        for name, losses, tokens in sums:
            found, table = _by_segment(losses, tokens, name)
            yield {f"{metrics_of(name)}{metric}": value for metric, value in found.items()}, table


def metrics_of(dataset: str) -> str:
    """Return how the metrics of a validation dataset begin; the only one, or all together, have the empty name."""
    return f"val/{dataset}/" if dataset else "val/"


def check_metric(metric: str, option: str, trainer: Trainer) -> None:
    """Raise ValueError if the validations of a run will not log a metric, as far as can be told at its start.

    Args:
        metric: its name.
        option: the option that holds it.
        trainer: of the run, with its data.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    names = data.validation_names if isinstance(data, LaneDataModule) and data.validates else []
    if not names or trainer.limit_val_batches == 0:
        raise ValueError(f"{option}: found {metric}, expected none: the run has no validation")
    prefixes = sorted({metrics_of(name) for name in ["", *names]})
    if not re.fullmatch(rf"({'|'.join(map(re.escape, prefixes))})({KINDS})", metric):
        known = ", ".join(f"{prefix}loss" for prefix in prefixes)
        raise ValueError(
            f"{option}: found {metric}, expected {known}, or memory_benefit, recall or segment_N in the place of loss"
        )


def _by_segment(losses: Tensor, tokens: Tensor, dataset: str) -> tuple[dict[str, float], Table]:
    """Return losses in nats per token, all together and by segment, and a table of them.

    Args:
        losses: float64 [2, BUCKETS], sums of losses with the memory on and off.
        tokens: float64 [BUCKETS], numbers of labels.
        dataset: name of the dataset.
    """
    on, off = (losses.sum(1) / tokens.sum()).tolist()
    values = {"loss": on, "memory_benefit": off - on}
    title = f"validation loss{f' of {dataset}' if dataset else ''}, nats per token"
    table = Table("segment", "tokens", "loss", "memory off", title=title)
    for bucket in torch.nonzero(tokens)[:, 0].tolist():
        name, here = bucket_name(bucket), (losses[:, bucket] / tokens[bucket]).tolist()
        values[f"segment_{name}"], values[f"segment_{name}_memory_off"] = here
        table.add_row(name, f"{int(tokens[bucket]):,}", *(f"{loss:.4f}" for loss in here))
    table.add_row("all", f"{int(tokens.sum()):,}", f"{on:.4f}", f"{off:.4f}")
    return values, table


def without_padded_rows(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a validation batch without its last rows, as far as they are all padding.

    One row stays in any case, so that all ranks run the model equally often.
    """
    rows = max(1, int((batch["docs"] >= 0).any(1).sum()))
    return {name: value[:rows] if isinstance(value, Tensor) else value for name, value in batch.items()}
