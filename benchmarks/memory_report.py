"""Does the memory work? `make memory-report`, or `python -m benchmarks.memory_report recall --seeds 1`.

Each part trains every rule on documents of `data_prep synth`, with one budget and learning rate, and asks what only
the memory can know, in documents 16 times as long as any it was trained on. All that is finished is kept in
runs/memory-report and not done again; every step is a command that a user can type.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path("runs/memory-report")
CONFIG = "configs/recall.yaml"
RULES = ("selective-delta", "paper-linear", "paper-delta")
# Documents of 1 to 4 windows of 512 tokens, half of them with fewer keys: see docs/memory.md.
DOCUMENTS = "--documents", "6000", "--tokens", "2048", "--shortest", "512"
PARTS = {
    "recall": ("--keys", "64", "--fewest", "4", "--values", "64"),
    "overwrite": ("--keys", "32", "--fewest", "4", "--values", "32", "--change", "0.06"),
}
STEPS = {"recall": 3000, "overwrite": 1200}
TIMES = 16  # evaluated documents over the longest trained on
SEGMENTS = {"8-15": "at 16 segments", "512-1023": "at 1,024"}  # buckets of the evaluation


def run(*words: str | Path) -> None:
    command = [sys.executable, "-m", *(str(word) for word in words)]
    print(f"$ {shlex.join(command[1:])}", flush=True)
    subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})


def measure(part: str, rule: str, seed: int) -> dict:
    """Train, unless it is done; ask, unless it is done; the evaluation's JSON."""
    data, directory = ROOT / part / "data", ROOT / part / f"{rule}-seed{seed}"
    if not data.exists():
        run("data_prep", "synth", "--out", data, *DOCUMENTS, *PARTS[part])
    out = directory / "recall.json"
    if not out.exists():
        options = ("--model.memory", rule, "--model.seed", str(seed), "--data.seed", str(seed))
        options += ("--trainer.max_steps", str(STEPS[part]), "--data.train", str(data), "--ckpt_path", "last")
        run("infini_train", "fit", "--config", CONFIG, "--run", directory, *options)
        evaluation = ("--dataset", data, "--times", str(TIMES), "--out", out)
        run("infini_train.evaluation", "recall", directory / "checkpoints", *evaluation)
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    options = parser.parse_args()
    figures: dict[str, dict] = {}
    for part in options.parts:
        kind = "latest" if part == "overwrite" else "memory_only"
        table = Table("rule", *SEGMENTS.values(), title=f"{part}: accuracy on what only the memory knows, by seed")
        for rule in options.rules:
            found = [measure(part, rule, seed)["accuracy"][kind] for seed in range(options.seeds)]
            by_segment = {
                name: [row["on"] for rows in found for row in rows if row["segment"] == bucket]
                for bucket, name in SEGMENTS.items()
            }
            figures.setdefault(part, {})[rule] = by_segment
            cells = [f"{statistics.mean(v):.3f} ({', '.join(f'{x:.3f}' for x in v)})" for v in by_segment.values()]
            table.add_row(rule, *cells)
        Console(width=118).print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
