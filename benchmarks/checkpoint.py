"""How long training waits for a save, and how long the save takes: `python -m benchmarks.checkpoint`.

96 M parameters with Adam's two moments, float32, one rank, 8 lanes. The pause is that of the copies in memory; the
rest is written in a thread.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.training import fragments, lane_memory
from infini_train.training.checkpoint_format import write_tensors
from infini_train.training.optim import OptimizerOptions, build

ROUNDS, LANES = 3, 8


def main() -> None:
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
    Console().print(table)
    print(
        json.dumps({"benchmark": "checkpoint", "bytes": size, "pause_s": round(pause, 3), "write_s": round(write, 3)})
    )


if __name__ == "__main__":
    main()
