"""Tokens a second out of local shards (page cache warm): `python -m benchmarks.loader [DATASET]`.

`read`: slices of one window at random places, as the reader gives them. `batch`: whole batches (inputs, labels,
document numbers) made in one process. `loader`: the same through the DataLoader with workers.
Without DATASET it writes one of 64 M tokens to a temporary directory. Medians of three turns.
"""

import json
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
from lightning import Trainer
from rich.console import Console
from rich.table import Table

from infini_train.data.batches import PlannedBatches
from infini_train.data.datamodule import LaneDataModule
from infini_train.data.lanes import LaneScheduler
from infini_train.data.plans import LanePlans
from infini_train.data.reader import TokenReader
from tests.helpers.datasets import make_dataset

LANES, SEGMENT, WORKERS = 8, 2_048, 2
TOKENS = 8_000_000  # of each measurement


def measure(root: str, window: int) -> dict[str, float]:
    data = LaneDataModule(
        root,
        segment_length=SEGMENT,
        segments_per_window=window // SEGMENT,
        lanes=LANES,
        micro_batch_size=LANES,
        num_workers=WORKERS,
    )
    steps = TOKENS // (LANES * window)
    data.trainer = Trainer(accelerator="cpu", logger=False, max_steps=steps + 50)
    data.setup("fit")
    index = data.index["train"]
    reader = TokenReader(index)
    rng = np.random.default_rng(0)
    docs = rng.choice(np.flatnonzero(index.tokens_D > window), TOKENS // window)
    places = [(int(doc), int(rng.integers(0, index.tokens_D[doc] - window))) for doc in docs]
    scheduler = LaneScheduler(index.tokens_D, lanes=LANES, window=window, seed=0, fingerprint="")
    plans = list(LanePlans(scheduler, steps, rank=0, world_size=1, accumulate=1))
    batches = PlannedBatches(reader)

    def loaded() -> float:
        stream = iter(data.train_dataloader())
        next(stream)  # workers are up
        start = time.perf_counter()
        for _ in islice(stream, steps):
            pass
        return steps * LANES * window / (time.perf_counter() - start) / 1e6

    def slices() -> float:
        start = time.perf_counter()
        for doc, offset in places:
            reader.read(doc, offset, window)
        return TOKENS / (time.perf_counter() - start) / 1e6

    def made() -> float:
        start = time.perf_counter()
        for plan in plans:
            batches[plan]
        return steps * LANES * window / (time.perf_counter() - start) / 1e6

    turns = [{"read": slices(), "batch": made(), "loader": loaded()} for _ in range(3)]
    return {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = sys.argv[1] if len(sys.argv) > 1 else f"{temporary}/set"
        if len(sys.argv) == 1:
            make_dataset(Path(root), [500_000] * 128, vocab_size=32_000, per_shard=16)
        table = Table("window", "read M tokens/s", "batch M tokens/s", f"loader, {WORKERS} workers, M tokens/s")
        results = []
        for window in (2_048, 8_192, 32_768):
            found = measure(root, window)
            table.add_row(f"{window:,}", *(f"{x:,.1f}" for x in found.values()))
            results.append({"window": window, **{f"{k}_Mtokens_per_s": v for k, v in found.items()}})
    Console().print(table)
    print(json.dumps({"benchmark": "loader", "lanes": LANES, "results": results}))


if __name__ == "__main__":
    main()
