"""Tokens per second read from local shards in the page cache: `python -m benchmarks.loader [DATASET]`.

`read`: slices of one window at random places, by the reader alone. `batch`: whole batches (inputs, labels, document
numbers) made in one process. `loader`: the same batches through the DataLoader with workers.
Without DATASET it writes a dataset of 64 M tokens to a temporary directory. Medians of three turns.
"""

import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
from lightning import Trainer
from rich.table import Table

from benchmarks import results
from infini_train.data.batches import PlannedBatches
from infini_train.data.datamodule import LaneDataModule
from infini_train.data.lanes import LaneScheduler
from infini_train.data.plans import LanePlans
from infini_train.data.reader import TokenReader
from tests.helpers.datasets import make_dataset

LANES, SEGMENT, WORKERS = 8, 2_048, 2
TOKENS = 8_000_000  # per measurement


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
    parser = results.parser(__doc__)
    parser.add_argument("dataset", nargs="?", help="a directory of shards")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.dataset or f"{temporary}/set"
        if not options.dataset:
            make_dataset(Path(root), [500_000] * 128, vocab_size=32_000, per_shard=16)
        table = Table("window", "read M tokens/s", "batch M tokens/s", f"loader, {WORKERS} workers, M tokens/s")
        windows = []
        for window in (2_048, 8_192, 32_768):
            found = measure(root, window)
            table.add_row(f"{window:,}", *(f"{x:,.1f}" for x in found.values()))
            windows.append({"window": window, **{f"{k}_Mtokens_per_s": v for k, v in found.items()}})
    rates = [f"{row['loader_Mtokens_per_s']:.1f}" for row in windows]
    summary = {
        f"batches of {LANES} rows of 2,048 tokens made in one process": f"{windows[0]['batch_Mtokens_per_s']:.0f} "
        "M tokens/s",
        f"through {WORKERS} loader workers, windows of 2,048, 8,192, 32,768": f"{', '.join(rates)} M tokens/s",
    }
    figures = {"benchmark": "loader", "lanes": LANES, "results": windows}
    results.report("loader", {"": table}, figures, summary, options.results)


if __name__ == "__main__":
    main()
