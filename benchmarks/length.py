"""One document of a million tokens, trained on window after window: `python -m benchmarks.length`.

Dim 128, 2 layers, 2 heads of 64, segments of 256, windows of 16 segments, vocabulary 4,096, one row, float32, AdamW,
selective-delta, with the memory carried from window to window. Peak memory is that of the process up to each mark.
Speed is measured at the end, by windows that continue from the memories of all marks in turn, because figures taken
minutes apart differ by more than the effect. The last column is the median of the four windows before a mark.
benchmarks/generation.py measures reading and generation at these lengths.
"""

import statistics
import time
from functools import partial

import torch
from rich.table import Table

from benchmarks import results
from benchmarks.memory_cost import build
from benchmarks.timing import interleaved, ratio, status_mib
from infini_train.model.memory_rule import MemoryState
from infini_train.training.allocator import configure_malloc

WINDOW, MARKS, ROUNDS = 4096, (16_384, 65_536, 262_144, 1_048_576), 15


def main() -> None:
    options = results.parser(__doc__).parse_args()
    configure_malloc()  # as in training
    model = build("selective-delta", dim=128, layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(memory: list[MemoryState] | None) -> list[MemoryState]:
        ids = torch.randint(4096, (1, WINDOW))
        out = model.token_losses(ids, ids, memory=memory)
        out.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return [{name: x.detach() for name, x in layer.items()} for layer in out.memory]

    memory, rates = None, list[float]()
    memories: dict[int, list[MemoryState]] = {}
    marks: dict[int, dict[str, float]] = {}
    # The first 32 windows belong to another document and are not measured: libraries initialise themselves, and a
    # heap that keeps freed blocks takes about thirty windows to settle.
    for done in range(-32 * WINDOW, MARKS[-1], WINDOW):
        begin = time.perf_counter()
        memory = step(None if done == 0 else memory)
        rates.append(WINDOW / (time.perf_counter() - begin))
        if (tokens := done + WINDOW) in MARKS:
            memories[tokens] = memory
            marks[tokens] = {"peak MiB": status_mib("VmHWM"), "streamed tokens/s": statistics.median(rates[-4:])}
    seconds = interleaved({str(tokens): partial(step, before) for tokens, before in memories.items()}, ROUNDS)
    over = f"over {MARKS[0]:,}"
    table = Table(
        "tokens so far", "tokens/s", f"speed {over}", "peak memory, MiB", f"memory {over}", "tokens/s in training"
    )
    for tokens, found in marks.items():
        took = seconds[str(tokens)]
        found |= {
            "tokens/s": WINDOW / statistics.median(took),
            "speed over first": ratio(seconds[str(MARKS[0])], took),
        }
        found["memory over first"] = found["peak MiB"] / marks[MARKS[0]]["peak MiB"]
        formats = {"tokens/s": ",.0f", "speed over first": ".3f", "peak MiB": ",.0f", "memory over first": ".3f"}
        formats["streamed tokens/s"] = ",.0f"
        table.add_row(f"{tokens:,}", *(format(found[name], form) for name, form in formats.items()))
    last = marks[MARKS[-1]]
    what = "training at 1,048,576 tokens of one document over 16,384: speed, peak memory"
    summary = {what: f"{last['speed over first']:.3f} x, {last['memory over first']:.3f} x"}
    figures = {"benchmark": "length", "threads": torch.get_num_threads(), "results": marks}
    results.report("length", {"": table}, figures, summary, options.results)


if __name__ == "__main__":
    main()
