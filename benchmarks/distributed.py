"""Step time and bytes on the wire of DDP and ZeRO 1, 2, 3 at two ranks: `python -m benchmarks.distributed`.

Dim 256, 4 layers, vocabulary 4,096, one row of 512 tokens per rank, float32, gloo over the loopback device, one
thread per rank. Jobs take turns, and medians are over the steps of all of them. Bytes are what the loopback device
carried from the end of one step to the end of the next, including protocol overhead and any other traffic.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich.table import Table

from benchmarks import results
from tests.helpers.datasets import make_dataset

STRATEGIES, ROUNDS, STEPS, RANKS = ("ddp", "zero1", "zero2", "zero3"), 2, 12, 2
# Ideal bytes per step over all ranks, in float32 parameters x (ranks - 1). DDP reduces and gathers gradients; ZeRO-1
# and 2 reduce gradients and gather weights; ZeRO-3 gathers weights twice, before forward and before backward.
IDEAL = {"ddp": 2, "zero1": 2, "zero2": 2, "zero3": 3}


def loopback_bytes() -> int:
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])  # sent


class Meter(Callback):
    """Records the time and the bytes sent at the end of every step of rank 0."""

    def __init__(self, out: str):
        self.out, self.stamps = Path(out), []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            self.stamps.append((time.perf_counter(), loopback_bytes()))
            parameters = sum(getattr(p, "ds_numel", p.numel()) for p in pl_module.parameters())
            self.out.write_text(json.dumps({"stamps": self.stamps, "parameters": parameters}))


def measure(strategy: str, root: Path) -> dict[str, Any]:
    out = root / "meter.json"
    options = {
        "run": tempfile.mkdtemp(dir=root),
        "data.train": root / "shards",
        "data.segment_length": 256,
        "data.segments_per_window": 2,
        "data.lanes": RANKS,
        "data.micro_batch_size": 1,
        "model.vocab_size": 4096,
        "model.hidden_size": 256,
        "model.intermediate_size": 704,
        "model.num_hidden_layers": 4,
        "model.num_attention_heads": 4,
        "trainer.accelerator": "cpu",
        "trainer.devices": RANKS,
        "trainer.strategy": strategy,
        "trainer.max_steps": STEPS,
        "trainer.enable_progress_bar": "false",
        "trainer.callbacks+": f"{{class_path: benchmarks.distributed.Meter, init_args: {{out: {out}}}}}",
        "checkpoint.every_n_steps": 1000,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    # torchrun, because Lightning starts its ranks one after the other and half of the time is imports.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += ["-m", "--", "infini_train", "fit", *words]  # otherwise torchrun reads --run as a prefix
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return json.loads(out.read_text())


def main() -> None:
    parsed = results.parser(__doc__).parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    sent: dict[str, list[int]] = {name: [] for name in STRATEGIES}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make_dataset(root / "shards", [40_000] * 8, vocab_size=4096)
        for _ in range(ROUNDS):
            for name in STRATEGIES:
                found = measure(name, root)
                stamps = found["stamps"][3:]  # the first steps include initialisation
                seconds[name] += [b[0] - a[0] for a, b in itertools.pairwise(stamps)]
                sent[name] += [b[1] - a[1] for a, b in itertools.pairwise(stamps)]
    unit = 4 * found["parameters"] * (RANKS - 1)
    table = Table("strategy", "step, ms", "over ddp", "MB a step", "ideal MB", title=f"{RANKS} ranks, gloo")
    strategies = {}
    base = statistics.median(seconds["ddp"])
    for name in STRATEGIES:
        step, wire, ideal = statistics.median(seconds[name]), statistics.median(sent[name]), IDEAL[name] * unit
        strategies[name] = {
            "step_s": round(step, 4),
            "over_ddp": round(step / base, 3),
            "bytes": wire,
            "ideal": ideal,
        }
        table.add_row(name, f"{step * 1e3:,.0f}", f"{step / base:.2f}", f"{wire / 1e6:.1f}", f"{ideal / 1e6:.1f}")
    ratios = ", ".join(f"{strategies[name]['over_ddp']:.2f}" for name in STRATEGIES[1:])
    summary = {"step of ZeRO 1, 2, 3 over DDP, two ranks": f"{ratios} x"}
    results.report("distributed", {"": table}, strategies, summary, parsed.results)


if __name__ == "__main__":
    main()
