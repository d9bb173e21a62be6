"""Tokens and time to a loss on the data of `make train`: python -m benchmarks.recipe

Each arm is configs/debug.yaml with the options of an arm. The first, the best and that with a narrower window of
local attention have several seeds of weights and data, the others one. `loss` is on the validation documents;
`other - on` is how much it rises with the memory of another document. `--data BOOKS` uses a directory of text files
instead, and the first 16,384 tokens of those for validation. A finished run is kept in --root and not repeated. Those
with several seeds are timed at the end over a few steps, in turns; nothing else may run on the machine then.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import results
from benchmarks.commands import run
from benchmarks.timing import ratio
from infini_train.inspection.events import history

# The recipe of configs/debug.yaml when the comparison was made; an arm changes some of it.
BASE = "--model.optimizer.name adamw --model.optimizer.lr 3e-3 --model.optimizer.warmup_steps 50 "
BASE += "--trainer.max_steps 300 --data.lanes 4 --data.micro_batch_size 4 --data.segments_per_window 16"
TIMED, ROUNDS = 60, 3  # steps, rounds
MUON, QK_NORM = "--model.optimizer.name muon", "--model.qk_norm true"
FAST, FASTER = "--model.optimizer.lr 6e-3", "--model.optimizer.lr 1e-2"
# Half of the tokens in each of as many steps; a quarter in each of twice as many.
SHORT = "--data.segments_per_window 8"
SHORTER = "--data.segments_per_window 4 --trainer.max_steps 600"
BEST = "muon, windows of 4 segments, 6e-3, QK norm"  # configs/muon.yaml
NARROW = "adamw, sliding window of 64"  # as long as a segment, instead of twice as long
COMPARED = ("adamw", BEST, NARROW)  # with several seeds, and in time
ARMS = {
    "adamw": "",  # configs/debug.yaml, which now ends earlier
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
    NARROW: "--model.sliding_window 64",
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


def fit(arm: str, seed: int, shards: Path, directory: Path, *options: str) -> None:
    """Train an arm in this directory, or go on with it."""
    words = [*BASE.split(), *ARMS[arm].split(), "--model.seed", str(seed), "--data.seed", str(seed)]
    words += ["--data.train", str(shards / "train"), "--trainer.limit_val_batches", "0", *options]
    config = ("--config", "configs/debug.yaml", "--run", directory, "--ckpt_path", "last")
    run("infini_train", "fit", *config, *words, log=directory.with_suffix(".log"))


def measure(arm: str, seed: int, shards: Path, root: Path, limit: tuple[str, ...]) -> dict[str, Any]:
    """Train an arm and evaluate it, with the options `limit`, unless that is done.

    Returns:
        steps and tokens of the training, `loss` and `other_minus_on` in nats per token.
    """
    directory = root / f"{arm.replace(' ', '-').replace(',', '')}-seed{seed}"
    if not (out := directory / "segments.json").exists():
        fit(arm, seed, shards, directory, "--checkpoint.every_n_steps", "1000")
        evaluated = (directory / "checkpoints", "--dataset", shards / "valid", "--out", out, *limit)
        run("infini_train", "evaluate", "segments", *evaluated, log=directory.with_suffix(".log"))
    of_all_segments = json.loads(out.read_text())["segments"][-1]
    metrics = json.loads(next((directory / "checkpoints").glob("step-*/metrics.json")).read_text())
    return {
        "steps": metrics["step"],
        "tokens": metrics["tokens"],
        "loss": of_all_segments["on"],
        "other_minus_on": of_all_segments["other_minus_on"],
    }


def step_seconds(arm: str, shards: Path) -> float:
    """Train an arm for a few steps, and return the time of one of the later ones in seconds."""
    with tempfile.TemporaryDirectory() as name:
        fit(
            arm, 0, shards, Path(name) / "run", "--trainer.max_steps", str(TIMED), "--trainer.log_every_n_steps", "10"
        )
        points = history(Path(name) / "run" / "tensorboard").points["speed/step_seconds"]
    return statistics.median(point.value for point in points if point.step > TIMED // 2)


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
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in parsed.arms}
    for seed in range(parsed.seeds):
        for arm in (arm for arm in parsed.arms if seed == 0 or arm in COMPARED):
            found[arm].append(measure(arm, seed, shards, root, limit))
    table = Table("arm", "steps", "tokens", "loss", "by seed", "other - on", title=f"{root.name}, nats per token")
    for arm, runs in found.items():
        mean = {key: statistics.mean(one[key] for one in runs) for key in runs[0]}
        by_seed = ", ".join(f"{one['loss']:.3f}" for one in runs)
        sizes = f"{mean['steps']:,.0f}", f"{mean['tokens'] / 1e6:.2f} M"
        table.add_row(arm, *sizes, f"{mean['loss']:.3f}", by_seed, f"{mean['other_minus_on']:.3f}")
    # These take turns, so that a machine that slows down slows both of them down.
    seconds = [{arm: step_seconds(arm, shards) for arm in COMPARED} for _ in range(ROUNDS)]
    time = Table("arm", "seconds of a step", "of all steps", "over adamw's", title="time, medians of rounds")
    whole = {arm: [one[arm] * found[arm][0]["steps"] for one in seconds] for arm in COMPARED if arm in found}
    for arm, of_rounds in whole.items():
        step = statistics.median(one[arm] for one in seconds)
        over = ratio(of_rounds, whole.get("adamw", of_rounds))
        time.add_row(arm, f"{step:.2f}", f"{statistics.median(of_rounds):.0f}", f"{over:.2f}")
    figures = {"runs": found, "step_seconds": seconds}
    name = f"recipe_{root.name}" if parsed.data else "recipe"
    results.report(name, {"": table, "time": time}, figures, {}, parsed.results, width=120)


if __name__ == "__main__":
    main()
