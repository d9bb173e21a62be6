"""Tokens and time to a loss on the data of `make train`: python -m benchmarks.recipe

Each arm is configs/debug.yaml with the options of an arm. The first and the best have several seeds of weights and
data, the others one. `loss` is on the validation documents; `other - own` is how much it rises with the memory of
another document. `--data BOOKS` uses a directory of text files instead, and the first 16,384 tokens of those for
validation. A finished run is kept in --root and not repeated. The time is that of the steps, by the clock, so nothing
else should run on the machine.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import results
from benchmarks.commands import run
from infini_train.inspection.events import history

# The recipe of configs/debug.yaml when the comparison was made; an arm changes some of it.
BASE = "--model.optimizer.name adamw --model.optimizer.lr 3e-3 --model.optimizer.warmup_steps 50 "
BASE += "--trainer.max_steps 300 --data.lanes 4 --data.micro_batch_size 4 --data.segments_per_window 16"
HALF = "--trainer.max_steps 150 --model.optimizer.warmup_steps 25"
MUON, QK_NORM = "--model.optimizer.name muon", "--model.qk_norm true"
FAST, FASTER = "--model.optimizer.lr 6e-3", "--model.optimizer.lr 1e-2"
# Half of the tokens in each of as many steps; a quarter in each of twice as many, by shorter windows or fewer lanes.
SHORT = "--data.segments_per_window 8"
SHORTER = "--data.segments_per_window 4 --trainer.max_steps 600"
NARROW = f"{SHORT} --data.lanes 2 --data.micro_batch_size 2 --trainer.max_steps 600"
BEST = "muon, windows of 4 segments, 6e-3, QK norm"
ARMS = {
    "adamw": "",
    "adamw, half of the steps": HALF,
    "muon, half of the steps": f"{MUON} {HALF}",
    "adamw, windows of 8 segments": SHORT,
    "muon, windows of 8 segments": f"{MUON} {SHORT}",
    "muon, windows of 8 segments, two lanes": f"{MUON} {NARROW}",
    "muon, windows of 8 segments, 6e-3": f"{MUON} {SHORT} {FAST}",
    "muon, windows of 8 segments, 6e-3, decay to 0": f"{MUON} {SHORT} {FAST} --model.optimizer.final_lr 0",
    "muon, windows of 8 segments, 6e-3, WSD": (
        f"{MUON} {SHORT} {FAST} --model.optimizer.schedule wsd --model.optimizer.decay_steps 150 "
        "--model.optimizer.final_lr 0"
    ),
    "muon, windows of 8 segments, 6e-3, QK norm": f"{MUON} {SHORT} {FAST} {QK_NORM}",
    "muon, windows of 8 segments, 1e-2": f"{MUON} {SHORT} {FASTER}",
    "muon, windows of 4 segments, 6e-3": f"{MUON} {SHORTER} {FAST}",
    BEST: f"{MUON} {SHORTER} {FAST} {QK_NORM}",
    "muon, windows of 4 segments, 1e-2, QK norm": f"{MUON} {SHORTER} {FASTER} {QK_NORM}",
    "adamw, windows of 4 segments, 6e-3, QK norm": f"{SHORTER} {FAST} {QK_NORM}",
}


def prepared(data: Path | None, root: Path) -> Path:
    """Make the dataset as `make train` does, unless it is there, and return its directory."""
    documents, tokenizer, shards = data or root / "documents.jsonl.gz", root / "tokenizer.model", root / "shards"
    prep = ("infini_train", "prep")
    if not data:
        run(*prep, "collect-stdlib", documents)
    run(*prep, "tokenizer", documents, "--out", tokenizer, "--vocab_size", "4096", "--overwrite")
    words = ("--tokenizer", tokenizer, "--out", shards, "--validation_fraction", "0.05", "--overwrite")
    run(*prep, "shard", documents, *words)
    return shards


def measure(arm: str, seed: int, shards: Path, root: Path, limit: tuple[str, ...]) -> dict[str, Any]:
    """Train an arm and evaluate it, with the options `limit`, unless that is done.

    Returns:
        tokens that it was trained on, seconds of its steps, `loss` and `other_minus_own` in nats per token.
    """
    directory = root / f"{arm.replace(' ', '-').replace(',', '')}-seed{seed}"
    log, out = directory.with_suffix(".log"), directory / "segments.json"
    if not out.exists():
        options = [*BASE.split(), *ARMS[arm].split(), "--model.seed", str(seed), "--data.seed", str(seed)]
        options += ["--data.train", str(shards / "train"), "--checkpoint.every_n_steps", "1000"]
        options += ["--trainer.limit_val_batches", "0"]
        config = ("--config", "configs/debug.yaml", "--run", directory)
        run("infini_train", "fit", *config, *options, "--ckpt_path", "last", log=log)
        evaluated = (directory / "checkpoints", "--dataset", shards / "valid", "--out", out, *limit)
        run("infini_train", "evaluate", "segments", *evaluated, log=log)
    points = history(directory / "tensorboard").points
    rows = json.loads(out.read_text())["segments"]
    metrics = next((directory / "checkpoints").glob("step-*/metrics.json"))
    return {
        "tokens": json.loads(metrics.read_text())["tokens"],
        "seconds": statistics.mean(p.value for p in points["speed/step_seconds"]) * points["train/loss"][-1].step,
        "loss": rows[-1]["on"],
        "other_minus_own": rows[-1]["other_minus_on"],
    }


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--data", type=Path, help="a directory of text files instead of Python's library")
    parser.add_argument("--root", type=Path, default=Path("runs/recipe"))
    parsed = parser.parse_args()
    root = parsed.root / (parsed.data.resolve().name if parsed.data else "stdlib")
    shards = prepared(parsed.data, root)
    limit = ("--max_tokens", "16384") if parsed.data else ()
    # Arms take turns, so that a machine that slows down slows all of them down.
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in parsed.arms}
    for seed in range(parsed.seeds):
        for arm in (arm for arm in parsed.arms if seed == 0 or arm in ("adamw", BEST)):
            found[arm].append(measure(arm, seed, shards, root, limit))
    columns = ("arm", "tokens", "seconds", "loss, mean (by seed)", "other - own")
    table = Table(*columns, title=f"{root.name}, nats per token")
    for arm, runs in found.items():
        losses = [one["loss"] for one in runs]
        mean = {key: statistics.mean(one[key] for one in runs) for key in runs[0]}
        by_seed = ", ".join(f"{loss:.3f}" for loss in losses)
        table.add_row(
            arm,
            f"{mean['tokens']:,.0f}",
            f"{mean['seconds']:.0f}",
            f"{mean['loss']:.3f} ({by_seed})",
            f"{mean['other_minus_own']:.3f}",
        )
    results.report("recipe", {"": table}, found, {}, parsed.results, width=120)


if __name__ == "__main__":
    main()
