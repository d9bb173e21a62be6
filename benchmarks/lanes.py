"""Time that the lane scheduler takes to advance all lanes by one window: `python -m benchmarks.lanes`.

Every rank spends this time once per optimizer step, in its main process, including the cursor for the checkpoint.
"""

import statistics
import time

import numpy as np
from rich.table import Table

from benchmarks import results
from infini_train.data.lanes import LaneScheduler

STEPS = 200
CASES = [  # lanes, window, mean tokens of a document, documents
    (64, 32_768, 1_000_000, 10_000),
    (1_024, 32_768, 1_000_000, 10_000),
    (1_024, 32_768, 100_000, 1_000_000),
    (1_024, 32_768, 4_000, 1_000_000),
    (8_192, 32_768, 1_000_000, 100_000),
]


def main() -> None:
    options = results.parser(__doc__).parse_args()
    table = Table("lanes", "window", "mean document", "documents", "advance ms", "with cursor ms", "new epoch ms")
    found = []
    for lanes, window, mean, documents in CASES:
        tokens_D = np.random.default_rng(0).integers(2, 2 * mean, documents)
        scheduler = LaneScheduler(tokens_D, lanes=lanes, window=window, seed=0, fingerprint="")
        advance, with_cursor = [], []
        for _ in range(STEPS):
            start = time.perf_counter()
            scheduler.next_step()
            advance.append(time.perf_counter() - start)
            scheduler.cursor.to_dict()
            with_cursor.append(time.perf_counter() - start)
        start = time.perf_counter()
        LaneScheduler(tokens_D, lanes=lanes, window=window, seed=0, fingerprint="", cursor=scheduler.cursor)
        epoch = time.perf_counter() - start
        ms = [1e3 * x for x in (statistics.median(advance), statistics.median(with_cursor), epoch)]
        table.add_row(*(f"{x:,}" for x in (lanes, window, mean, documents)), *(f"{x:.3f}" for x in ms))
        names = ("lanes", "window", "mean_document", "documents", "advance_ms", "with_cursor_ms", "new_epoch_ms")
        found.append(dict(zip(names, (lanes, window, mean, documents, *ms), strict=True)))
    chosen = found[1]
    what = "advancing 1,024 lanes of documents of 1 M tokens by 32,768 tokens; with the cursor"
    summary = {what: f"{chosen['advance_ms']:.2f} ms; {chosen['with_cursor_ms']:.2f} ms"}
    figures = {"benchmark": "lanes", "median_of_steps": STEPS, "results": found}
    results.report("lanes", {"": table}, figures, summary, options.results)


if __name__ == "__main__":
    main()
