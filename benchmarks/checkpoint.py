"""Time that training waits for a save, and that saving and verifying it take: `python -m benchmarks.checkpoint`.

96 M parameters with Adam's two moments, float32, one rank, 8 lanes. Training waits for copies in memory only; a
thread writes them, waits until they are on disk, and reads them back. Who loads the checkpoint later compares the
digests again.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.table import Table

from benchmarks import results
from infini_train.files import xxh3_of_file
from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.training import fragments, lane_memory
from infini_train.training.checkpoint_format import write_tensors
from infini_train.training.optim import OptimizerOptions, build

ROUNDS, LANES = 3, 8
WHAT = ("training waits", "written, synced and read back", "verified by a reader")


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
    pauses, writes, verifications = [], [], []
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
            begin = time.perf_counter()
            for path in files:
                xxh3_of_file(path)
            verifications.append(time.perf_counter() - begin)
        size = sum(f.stat().st_size for f in Path(directory).iterdir())
    pause, write, verify = (statistics.median(seconds) for seconds in (pauses, writes, verifications))
    table = Table("GB", *(f"{what}, {unit}" for what in WHAT for unit in ("s", "GB/s")))
    table.add_row(f"{size / 1e9:.2f}", *(f"{x:.2f}" for s in (pause, write, verify) for x in (s, size / s / 1e9)))
    figures = {"benchmark": "checkpoint", "bytes": size, "pause_s": round(pause, 3), "write_s": round(write, 3)}
    figures["verify_s"] = round(verify, 3)
    what = f"saving {size / 1e9:.2f} GB: training waits; the thread writes and reads back; a reader verifies"
    said = f"{pause:.2f} s; {write:.1f} s; {verify:.1f} s"
    results.report("checkpoint", {"": table}, figures, {what: said}, options.results)


if __name__ == "__main__":
    main()
