"""One document of a million tokens, trained on window after window: `python -m benchmarks.length`.

Dim 256, 4 layers, 4 heads of 64, segments of 256, windows of 16 segments, vocabulary 4,096, one row, float32, AdamW,
the memory carried. Speed is that of the windows that end at each mark (the last 16,384 tokens before it), memory the
process's peak by then. Reading and generating at these lengths: benchmarks/generation.py.
"""

import json
import resource
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.memory_cost import build
from infini_train.training.allocator import keep_freed_blocks

RULES, WINDOW, MARKS = ("paper-linear", "selective-delta"), 4096, (16_384, 65_536, 262_144, 1_048_576)


def main() -> None:
    keep_freed_blocks()  # as in training
    models = {rule: build(rule) for rule in RULES}
    optimizers = {rule: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for rule, model in models.items()}
    memories: dict = dict.fromkeys(RULES)
    rates: dict[str, list[float]] = {rule: [] for rule in RULES}
    table = Table("tokens", *(f"{rule}, tokens/s" for rule in RULES), *(f"over {MARKS[0]:,}" for _ in RULES))
    table.add_column("peak memory of both, MiB")
    first, results = {}, {}
    # Two windows first that count nowhere: what libraries set up.
    for done in range(-2 * WINDOW, MARKS[-1], WINDOW):
        if done == 0:
            memories, rates = dict.fromkeys(RULES), {rule: [] for rule in RULES}
        for rule, model in models.items():  # in turns, so that what else the machine does falls on both
            ids = torch.randint(4096, (1, WINDOW))
            begin = time.perf_counter()
            out = model.model(ids, memory=memories[rule])
            model.lm_head(out.last_hidden_state, ids)[0].backward()
            optimizers[rule].step()
            optimizers[rule].zero_grad()
            memories[rule] = [{name: x.detach() for name, x in layer.items()} for layer in out.memory]
            rates[rule].append(WINDOW / (time.perf_counter() - begin))
        if (tokens := done + WINDOW) in MARKS:
            last = {rule: statistics.median(of[-MARKS[0] // WINDOW :]) for rule, of in rates.items()}
            first = first or last
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            over = {rule: last[rule] / first[rule] for rule in RULES}
            cells = *(f"{x:,.0f}" for x in last.values()), *(f"{x:.3f}" for x in over.values())
            table.add_row(f"{tokens:,}", *cells, f"{peak:,.0f}")
            results[str(tokens)] = {"tokens/s": last, "over first": over, "peak MiB": peak}
    Console(width=120).print(table)
    print(json.dumps({"benchmark": "length", "threads": torch.get_num_threads(), "results": results}))


if __name__ == "__main__":
    main()
