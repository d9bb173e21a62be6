"""Does the memory work? `make memory-report`, or one part: `python -m benchmarks.memory_report recall --seeds 1`.

recall, overwrite: every rule is trained on documents of `infini-train prep synth`, with the same budget and learning
rate, and then asked what only the memory can know, in documents 16 times as long as the longest of training. `recall`
also has another model with a memory (baselines.py).
passkey: a number told once in documents of up to 131,072 tokens, for models trained on at most 2,048.
books, stability: benchmarks/books.py and benchmarks/stability.py.

Finished parts are kept in runs/memory-report and not repeated, and every step is a command that a user can type. The
output is tables, the CPU time of every part, and a last line of JSON with all figures.
"""

import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import results
from benchmarks.baselines import Baseline
from benchmarks.books import REPORTED
from benchmarks.commands import CPU, run

ROOT = Path("runs/memory-report")
CONFIG = "configs/recall.yaml"
OURS, PAPER = "selective-delta", ("paper-linear", "paper-delta")
# Our rule as configurations for text have it: local attention sees the segment before, and there is an output memory.
# Without the steps in which it does not, the memory does not learn passkeys (docs/memory.md).
WITH_OUTPUT = "selective-delta + output"
OPTIONS_OF: dict[str, list[str]] = {
    OURS: [],
    WITH_OUTPUT: ["--model.sliding_window", "64", "--model.window_dropout", "0.5", "--model.output_memory_dim", "32"],
}
OTHERS: tuple[Baseline, ...] = ("gated-deltanet",)  # in `recall` only
RULES = (OURS, WITH_OUTPUT, *PAPER, *OTHERS)
TIMES = 16  # length of evaluated documents of recall and overwrite, over the longest of training
SEGMENTS = {"8-15": "at 16 segments", "512-1023": "at 1,024"}  # buckets of the evaluation
LENGTHS = (2048, 131072)  # tokens of the documents that hold a passkey


@dataclass(frozen=True)
class Part:
    """A training task: options of `infini-train prep synth`, the number of steps, and further options of `fit`."""

    documents: str
    steps: int
    options: str = ""
    kind: str = "memory_only"  # which answers count


# Documents of 1 to 4 windows of 512 tokens, half of them with fewer keys: see docs/memory.md.
DOCUMENTS = "--documents 6000 --tokens 2048 --shortest 512 --fewest 4"
PARTS = {
    "recall": Part(f"{DOCUMENTS} --keys 64 --values 64", 1600),
    "overwrite": Part(f"{DOCUMENTS} --keys 32 --values 32 --change 0.06", 1200, kind="latest"),
    # Documents full of mentions teach the memory to hold the number; a cost of writing teaches it to ignore noise.
    "passkey": Part(
        "--documents 8000 --tokens 2048 --shortest 512 --fewest 4 --keys 16 --values 16 "
        "--passkey 0.5 --thick 0.5 --passkey-change 0.2",
        2400,
        "--model.write_cost 0.3 --model.write_cost_from 1200",
    ),
}


def measure(name: str, rule: str, seed: int) -> dict[str, Any]:
    """Train and evaluate, unless that is done; returns the evaluation's JSON."""
    part, data = PARTS[name], ROOT / name / "data"
    directory = ROOT / name / f"{rule.replace(' ', '')}-seed{seed}"
    log, task = directory.with_suffix(".log"), "passkey" if name == "passkey" else "recall"
    out, plot = directory / f"{task}.json", directory / f"{task}.png"
    call = partial(run, log=log, part=name)
    if not out.exists():
        fit, evaluate = ("infini_train", "fit"), ("infini_train", "evaluate")
        options = ["--model.memory", rule.partition(" ")[0], *OPTIONS_OF.get(rule, ())]
        if rule in OTHERS:
            fit, evaluate = ("benchmarks.baselines", "fit"), ("benchmarks.baselines", "evaluate", rule)
            options = ["--model.baseline", rule, "--model.memory", OURS]
        options += ["--model.seed", str(seed), "--data.seed", str(seed)]
        options += ["--data.train", str(data), "--trainer.max_steps", str(part.steps), *part.options.split()]
        call(*fit, "--config", CONFIG, "--run", directory, *options, "--ckpt_path", "last")
        how = ["--lengths", *map(str, LENGTHS)] if task == "passkey" else ["--times", str(TIMES), "--rows", "16"]
        plot.unlink(missing_ok=True)  # left by an evaluation that was cut off
        words = (directory / "checkpoints", "--dataset", data, "--out", out, "--plot", plot, *how)
        call(*evaluate, task, *words)
    found = json.loads(out.read_text())
    if task == "passkey" and rule == OURS and seed == 0:  # once more, by generate() on the export
        export, spelled = directory / "export", directory / "generate.json"
        if not export.exists():
            call("infini_train", "export", directory / "checkpoints", export)
        if not spelled.exists():
            how = ["--generate", "--lengths", str(LENGTHS[-1])]
            call("infini_train", "evaluate", task, export, "--dataset", data, "--out", spelled, *how)
        found["generated"] = json.loads(spelled.read_text())["cells"]
    return found


def figures_of(name: str, found: dict[str, Any]) -> dict[str, float]:
    """Accuracies, by column of the report's table."""
    if name == "passkey":
        cells = {f"{length:,} tokens": [c for c in found["cells"] if c["tokens"] == length] for length in LENGTHS}
        cells["by generate()"] = found.get("generated", [])
        return {column: statistics.mean(c["right"] for c in those) for column, those in cells.items() if those}
    rows = {row["segment"]: row["on"] for row in found["accuracy"][PARTS[name].kind]}
    return {column: rows[bucket] for bucket, column in SEGMENTS.items()}


SUMMARY = {
    "recall": f"64 keys of earlier segments recalled, {OURS}, mean (by seed)",
    "overwrite": f"the latest of several values of 32 keys, {OURS}, mean (by seed)",
    "passkey": f"passkeys told once, all depths, trained on 2,048 tokens, {OURS}, mean (by seed)",
}


def of_ours(table: Table) -> dict[str, str]:
    """The row of our rule by column; empty if it was not trained."""
    found = results.as_rows(table)
    ours = next((row for row in found["rows"] if row[0] == OURS), [])
    return dict(zip(found["columns"][1:], ours[1:], strict=False))


def main(words: Sequence[str] | None = None) -> None:
    parser = results.parser(__doc__)
    others = ("books", "stability")
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS, *others], default=[], help="default: all")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of our rule; others have one")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at the same time, with one thread each")
    parser.add_argument("--data", type=Path, help="a directory of text files in train/ and valid/, for books")
    options = parser.parse_args(words)
    options.parts = options.parts or [*PARTS, *others]

    def arms(part: str) -> list[tuple[str, int]]:
        rules = [rule for rule in options.rules if part == "recall" or rule not in OTHERS]
        return [(rule, seed) for rule in rules for seed in range(options.seeds if rule in OPTIONS_OF else 1)]

    for name in (part for part in options.parts if part in PARTS):
        if not (ROOT / name / "data").exists():
            run("data_prep", "synth", "--out", ROOT / name / "data", *PARTS[name].documents.split())
    name = options.data.resolve().name if options.data else "stdlib"
    books = ("benchmarks.books", "--root", ROOT / "books", *(("--data", options.data) if options.data else ()))
    reports = {"books": ROOT / "books" / name / "report.json", "stability": Path("runs/stability/report.json")}
    written = ("--results", options.results) if options.results else ()
    longest: list[tuple[str, Path, tuple[str | Path, ...]]] = []
    if "books" in options.parts:
        run(*books, "--arms", part="books")  # without arms it only prepares the data
        longest += [("books", ROOT / "books" / f"{arm}.log", (*books, "--arms", arm)) for arm in REPORTED]
    if "stability" in options.parts:
        longest.append(("stability", ROOT / "stability.log", ("benchmarks.stability", *written)))
    for _, log, _ in longest:
        log.unlink(missing_ok=True)  # left by an earlier report
    with ThreadPoolExecutor(options.jobs) as pool:
        long = [pool.submit(run, *command, log=log, part=part) for part, log, command in longest]
        trained = {
            name: [pool.submit(measure, name, *arm) for arm in arms(name)]
            for name in options.parts
            if name in PARTS and arms(name)
        }
        everything = [*long, *(future for futures in trained.values() for future in futures)]
        done, _ = wait(everything, return_when=FIRST_EXCEPTION)
        for error in filter(None, (future.exception() for future in done)):
            print(f"{error}\nNo further part is started; running parts are finished.", file=sys.stderr, flush=True)
        pool.shutdown(cancel_futures=True)
    for future in done:
        future.result()  # raises the failure, if there is one
    figures: dict[str, Any] = {}
    for name, futures in trained.items():
        found = [figures_of(name, future.result()) for future in futures]
        table = Table("rule", *found[0], title=f"{name}: accuracy on what only the memory knows; by seed")
        for rule in dict.fromkeys(rule for rule, _ in arms(name)):
            of_rule = [row for (one, _), row in zip(arms(name), found, strict=True) if one == rule]
            by_column = {column: [row[column] for row in of_rule if column in row] for column in of_rule[0]}
            figures.setdefault(name, {})[rule] = by_column
            cells = (f"{statistics.mean(v):.4f} ({', '.join(f'{x:.4f}' for x in v)})" for v in by_column.values())
            table.add_row(rule, *cells)
        Console(width=118).print(table)
        if options.results:
            summary = {f"{SUMMARY[name]}, {column}": cell for column, cell in of_ours(table).items()}
            results.write(name, {"": table}, figures[name], summary, options.results)
    if "stability" in options.parts:
        print((ROOT / "stability.log").read_text())
    if "books" in options.parts:
        run(*books, *written)  # compares all arms
    for part in (part for part in reports if part in options.parts):
        figures[part] = json.loads(reports[part].read_text())
    spent: Counter[str] = Counter()
    for line in CPU.read_text().splitlines() if CPU.exists() else ():
        noted = json.loads(line)
        spent[noted["part"]] += noted["minutes"]
    figures["cpu_minutes"] = spent
    print("CPU minutes:", ", ".join(f"{part} {minutes:.0f}" for part, minutes in spent.items()))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
