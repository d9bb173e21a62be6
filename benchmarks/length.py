"""One document of a million tokens, trained on window after window: `python -m benchmarks.length`.

Dim 256, 4 layers, 4 heads of 64, segments of 256, windows of 16 segments, vocabulary 4,096, one row, float32, AdamW,
the memory carried, selective-delta. Speed is the median of the four windows before each mark, memory the process's
peak by then. Reading and generating at these lengths: benchmarks/generation.py.
"""

import json
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.memory_cost import build
from benchmarks.timing import status_mib
from infini_train.training.allocator import keep_freed_blocks

WINDOW, MARKS = 4096, (16_384, 65_536, 262_144, 1_048_576)


def main() -> None:
    keep_freed_blocks()  # as in training
    model, memory, rates = build("selective-delta"), None, list[float]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    table = Table("tokens", "tokens/s", f"over {MARKS[0]:,}", "peak memory, MiB", f"over {MARKS[0]:,}")
    results: dict[str, dict[str, float]] = {}
    # Windows of another document first, which count nowhere: libraries set themselves up, and a heap that keeps freed
    # blocks takes some thirty windows to settle.
    for done in range(-32 * WINDOW, MARKS[-1], WINDOW):
        memory = None if done == 0 else memory
        ids = torch.randint(4096, (1, WINDOW))
        begin = time.perf_counter()
        out = model.model(ids, memory=memory)
        model.lm_head(out.last_hidden_state, ids)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        assert out.memory is not None
        memory = [{name: x.detach() for name, x in layer.items()} for layer in out.memory]
        rates.append(WINDOW / (time.perf_counter() - begin))
        if (tokens := done + WINDOW) in MARKS:
            last = statistics.median(rates[-MARKS[0] // WINDOW :])
            peak = status_mib("VmHWM")
            first = results.setdefault(str(MARKS[0]), {"tokens/s": last, "peak MiB": peak})
            results[str(tokens)] = {"tokens/s": last, "peak MiB": peak}
            speed, memory_over = last / first["tokens/s"], peak / first["peak MiB"]
            table.add_row(f"{tokens:,}", f"{last:,.0f}", f"{speed:.3f}", f"{peak:,.0f}", f"{memory_over:.3f}")
    Console().print(table)
    print(json.dumps({"benchmark": "length", "threads": torch.get_num_threads(), "results": results}))


if __name__ == "__main__":
    main()
