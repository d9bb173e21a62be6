"""A LaneDataModule as Lightning sets it up, and a check of its batches against the reference scheduler."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from infini_train.data.datamodule import LaneDataModule
from infini_train.data.mixture import Part

LENGTHS = [40, 2, 7, 3, 25, 90, 12, 2, 31, 5]
LANES, SEGMENT, SEGMENTS, SEED = 8, 4, 2, 11
WINDOW = SEGMENT * SEGMENTS
STEPS = 4 * sum(LENGTHS) // (LANES * WINDOW) + 2  # over three epoch boundaries


def datamodule(
    root: Path | list[Part],
    *,
    world_size=1,
    rank=0,
    rows=LANES,
    steps=STEPS,
    workers=0,
    cursor=None,
    stage="fit",
    **options,
) -> LaneDataModule:
    """Set up as Lightning would on this rank."""
    options = {"segment_length": SEGMENT, "segments_per_window": SEGMENTS, "lanes": LANES, "seed": SEED} | options
    module = LaneDataModule(
        root if isinstance(root, list) else str(root), micro_batch_size=rows, num_workers=workers, **options
    )
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=world_size,
        global_rank=rank,
        accumulate_grad_batches=max(options["lanes"] // (rows * world_size), 1),
        max_steps=steps,
        limit_train_batches=1.0,
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=False),
    )
    module.cursor = cursor
    module.setup(stage)
    return module


def check_step(batches, expected, documents):
    """The micro-batches of one step, of all ranks, against a step of the reference scheduler."""
    expected = np.array(expected)  # [lanes, T, (document, position)]
    lanes = torch.cat([batch["lane_ids"] for batch in batches])
    assert sorted(lanes.tolist()) == list(range(LANES))
    labels = 0
    for batch in batches:
        for row, lane in enumerate(batch["lane_ids"].tolist()):
            for t, (doc, position) in enumerate(expected[lane].tolist()):
                last = position + 1 == len(documents[doc])
                assert batch["docs"][row, t] == doc
                assert batch["input_ids"][row, t] == documents[doc][position]
                assert batch["labels"][row, t] == (-100 if last else documents[doc][position + 1])
                assert (batch["starts"] is not None and bool(batch["starts"][row, t])) == (position == 0)
                labels += not last
        assert batch["starts"] is None or batch["starts"].any()
        assert batch["input_ids"].dtype == batch["labels"].dtype == batch["docs"].dtype == torch.int64
    assert {batch["step_tokens"] for batch in batches} == {labels}
