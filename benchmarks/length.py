"""One document of a million tokens, trained on window after window: `python -m benchmarks.length`.

Dim 128, 2 layers, 2 heads of 64, segments of 256, windows of 16 segments, vocabulary 4,096, one row, float32, AdamW,
the memory carried, selective-delta. Peak memory is the process's by each mark. Speed: at the end windows go on from
the memories of all marks in turn; beside it, the median of the four windows before the mark, as they came. Reading
and generating at these lengths: benchmarks/generation.py.
"""

import json
import statistics
import time
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.memory_cost import build
from benchmarks.timing import interleaved, ratio, status_mib
from infini_train.model.memory_rule import MemoryState
from infini_train.training.allocator import keep_freed_blocks

WINDOW, MARKS, ROUNDS = 4096, (16_384, 65_536, 262_144, 1_048_576), 15


def main() -> None:
    keep_freed_blocks()  # as in training
    model = build("selective-delta", dim=128, layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(memory: list[MemoryState] | None) -> list[MemoryState]:
        ids = torch.randint(4096, (1, WINDOW))
        out = model.model(ids, memory=memory)
        model.lm_head(out.last_hidden_state, ids)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        return [{name: x.detach() for name, x in layer.items()} for layer in out.memory]

    memory, rates = None, list[float]()
    memories: dict[int, list[MemoryState]] = {}
    results: dict[int, dict[str, float]] = {}
    # Windows of another document first, which count nowhere: libraries set themselves up, and a heap that keeps freed
    # blocks takes some thirty windows to settle.
    for done in range(-32 * WINDOW, MARKS[-1], WINDOW):
        begin = time.perf_counter()
        memory = step(None if done == 0 else memory)
        rates.append(WINDOW / (time.perf_counter() - begin))
        if (tokens := done + WINDOW) in MARKS:
            memories[tokens] = memory
            results[tokens] = {"peak MiB": status_mib("VmHWM"), "streamed tokens/s": statistics.median(rates[-4:])}
    seconds = interleaved({str(tokens): partial(step, before) for tokens, before in memories.items()}, ROUNDS)
    over = f"over {MARKS[0]:,}"
    table = Table("tokens so far", "tokens/s", over, "peak memory, MiB", over, "as they came, tokens/s")
    for tokens, found in results.items():
        took = seconds[str(tokens)]
        found |= {
            "tokens/s": WINDOW / statistics.median(took),
            "speed over first": ratio(seconds[str(MARKS[0])], took),
        }
        found["memory over first"] = found["peak MiB"] / results[MARKS[0]]["peak MiB"]
        formats = {"tokens/s": ",.0f", "speed over first": ".3f", "peak MiB": ",.0f", "memory over first": ".3f"}
        formats["streamed tokens/s"] = ",.0f"
        table.add_row(f"{tokens:,}", *(format(found[name], form) for name, form in formats.items()))
    Console().print(table)
    print(json.dumps({"benchmark": "length", "threads": torch.get_num_threads(), "results": results}))


if __name__ == "__main__":
    main()
