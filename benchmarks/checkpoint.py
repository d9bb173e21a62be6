"""Time that training waits for a save, and that the save takes: `python -m benchmarks.checkpoint`.

96 M parameters with Adam's two moments, float32, one rank, 8 lanes. Training waits for copies in memory only; a
thread writes them.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.table import Table

from benchmarks import results
from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.training import fragments, lane_memory
from infini_train.training.checkpoint_format import write_tensors
from infini_train.training.optim import OptimizerOptions, build

ROUNDS, LANES = 3, 8


def main() -> None:
    options = results.parser(__doc__).parse_args()
    model = InfiniForCausalLM(
        InfiniConfig(vocab_size=16384, hidden_size=768, intermediate_size=2048, num_hidden_layers=10)
    )
    optimizer, _ = build(model, OptimizerOptions(), 10)
    model(torch.zeros(1, 8, dtype=torch.long), labels=torch.zeros(1, 8, dtype=torch.long)).loss.backward()
    optimizer.step()
    lanes = lane_memory.LaneMemory()
    lanes.put(torch.arange(LANES), model.init_memory(LANES))
    pauses, writes = [], []
    with tempfile.TemporaryDirectory(dir=".") as directory:
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            owned = fragments.owned(model, None, 0, 1)
            files = {
                Path(directory) / "state.safetensors": fragments.snapshot(owned, optimizer),
                Path(directory) / "lanes.safetensors": lanes.snapshot(),
            }
            pauses.append(time.perf_counter() - begin)
            write_tensors(files)
            writes.append(time.perf_counter() - begin - pauses[-1])
        size = sum(f.stat().st_size for f in Path(directory).iterdir())
    pause, write = statistics.median(pauses), statistics.median(writes)
    table = Table("GB", "training waits, s", "copies, GB/s", "writing and syncing, s", "written, GB/s")
    table.add_row(*(f"{x:.2f}" for x in (size / 1e9, pause, size / pause / 1e9, write, size / write / 1e9)))
    figures = {"benchmark": "checkpoint", "bytes": size, "pause_s": round(pause, 3), "write_s": round(write, 3)}
    what = f"saving {size / 1e9:.2f} GB: training waits; the thread writes"
    results.report("checkpoint", {"": table}, figures, {what: f"{pause:.2f} s; {write:.1f} s"}, options.results)


if __name__ == "__main__":
    main()
