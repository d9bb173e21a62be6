"""Does the memory help on real books? `python -m benchmarks.books --data DIR`, of texts in DIR/train and DIR/valid.

An arm is a small model with one of the memory rules or with none (baselines.py). Arms are trained with the same seed,
batches, steps and optimizer, and have the same parameters except for the memory's few. Each then reads the beginnings
of all validation documents; losses are kept by document and segment, and arms are compared document by document.
Finished arms are kept and not repeated, and a run that was cut off resumes from its checkpoint. `--arms` without a
name only prepares the data; after that, several of these commands may train different arms at the same time.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import results
from benchmarks.baselines import Baseline, convert
from benchmarks.commands import run
from infini_train import plots
from infini_train.data.index import DatasetIndex
from infini_train.evaluation.segments import SegmentLosses, segment_losses
from infini_train.evaluation.subject import load
from infini_train.files import atomic_file
from infini_train.metrics.buckets import bucket_name
from infini_train.metrics.ratios import ratio

BASELINES: tuple[Baseline, ...] = get_args(Baseline)
OURS, COMPARED = "output-memory", ("transformer-xl-convolved", "empty")
SEGMENT, SEGMENTS, LANES = 128, 16, 2
RULE, FEATURES = "selective-delta", 32
# Options of the arms that are not simply a rule or a baseline: our rule with local attention to the last S tokens,
# and to the own segment and the whole one before; the latter with an output memory; and an output memory alone.
OPTIONS_OF: dict[str, dict[str, Any]] = {
    f"{RULE}-{SEGMENT}": {"model.memory": RULE, "model.sliding_window": SEGMENT},
    f"{RULE}-{2 * SEGMENT}": {"model.memory": RULE, "model.sliding_window": 2 * SEGMENT},
    OURS: {"model.memory": RULE, "model.sliding_window": 2 * SEGMENT, "model.output_memory_dim": FEATURES},
    "output-memory-alone": {"model.baseline": COMPARED[0], "model.output_memory_dim": FEATURES},
}
ARMS = (OURS, *(arm for arm in OPTIONS_OF if arm != OURS), RULE, "paper-delta", "paper-linear", *reversed(BASELINES))
OPTIONS = {
    "model.vocab_size": 4096,
    "model.gate_init": -3.0,  # without effect in the baselines
    "model.hidden_size": 192,
    "model.intermediate_size": 512,
    "model.num_hidden_layers": 4,
    "model.num_attention_heads": 3,
    "model.num_key_value_heads": 3,
    "model.tie_word_embeddings": "true",
    "model.memory_dropout": 0.3,
    "model.optimizer.gate_lr": 0.01,
    "data.segment_length": SEGMENT,
    "data.segments_per_window": SEGMENTS,
    "data.lanes": LANES,
    "data.micro_batch_size": LANES,
    "data.num_workers": 1,
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "checkpoint.every_n_steps": 25,
}


def prepare(data: Path | None, directory: Path) -> tuple[Path, Path]:
    """Make tokenizer and shards, unless they exist; returns the datasets for training and validation."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer, shards = directory / "tokenizer.model", directory / "shards"
    train = data / "train" if data else directory / "documents.jsonl.gz"
    if not data:
        run("data_prep", "collect-stdlib", train)
    run("data_prep", "tokenizer", train, "--out", tokenizer, "--vocab-size", str(OPTIONS["model.vocab_size"]))
    shard = ("data_prep", "shard", "--tokenizer", tokenizer)
    if data:
        for part in ("train", "valid"):
            run(*shard, data / part, "--out", shards / part)
    else:
        run(*shard, train, "--out", shards, "--validation-fraction", "0.05")
    return shards / "train", shards / "valid"


def measure(
    arm: str, lr: float, seed: int, directory: Path, train: Path, valid: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Train an arm and read the validation documents, unless that is done; returns what was saved.

    `losses` holds the fields of SegmentLosses: sums over the tokens of each document and bucket of segments.
    """
    directory = directory / f"{arm}-lr{lr:g}-steps{options.steps}-seed{seed}"
    out = directory / f"losses-{options.tokens}.json"
    if not out.exists():
        given = OPTIONS | {"model.seed": seed, "data.seed": seed, "model.optimizer.lr": lr}
        given |= {"trainer.max_steps": options.steps, "model.optimizer.warmup_steps": max(1, options.steps // 10)}
        options_of = OPTIONS_OF.get(arm, {"model.baseline" if arm in BASELINES else "model.memory": arm})
        baseline = options_of.get("model.baseline")
        convolved = baseline in (*COMPARED, "local-convolved")
        given |= {"model.memory": RULE if convolved else "paper-linear"} | options_of
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        program = "benchmarks.baselines" if baseline else "infini_train"
        run(program, "fit", "--run", directory, *words, "--data.train", train, "--ckpt_path", "last")
        index = DatasetIndex.load(valid)
        model = load(directory / "checkpoints", index, "cpu", torch.float32)
        if baseline:
            convert(model, baseline)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        losses = asdict(segment_losses(model, index, max_tokens=options.tokens)[0])
        found = {"parameters": parameters, "losses": {name: array.tolist() for name, array in losses.items()}}
        with atomic_file(out) as file:
            file.write(json.dumps(found).encode())
    return json.loads(out.read_text())


def seeds_of(arm: str, seeds: int) -> int:
    return 1 if arm.startswith("paper") else seeds


def mean_of(seeds: list[dict[str, Any]]) -> SegmentLosses:
    return SegmentLosses(**{name: np.mean([one["losses"][name] for one in seeds], 0) for name in seeds[0]["losses"]})


def compare(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Figures of all arms: means over seeds, standard errors over documents.

    Two arms are compared over the seeds that both have, because losses differ more between seeds than between arms.

    Args:
        found: for each arm, the results of `measure` by seed.

    Raises:
        ValueError: arms have not read the same tokens.
    """
    losses = {arm: mean_of(seeds) for arm, seeds in found.items()}
    first = next(iter(losses.values()))
    if wrong := [arm for arm, of in losses.items() if not np.array_equal(of.tokens, first.tokens)]:
        raise ValueError(f"{', '.join(wrong)}: found other validation tokens than of {next(iter(found))}")
    used = np.flatnonzero(first.tokens.sum(1)).tolist()
    buckets = {bucket_name(bucket): [bucket] for bucket in used} | {"all": used}

    def difference(a: str, b: str) -> dict[str, tuple[float, float | None]]:
        sums_BD = common[a, b][0].on - common[a, b][1].on
        return {name: ratio(sums_BD[rows].sum(0), first.tokens[rows].sum(0)) for name, rows in buckets.items()}

    def by_seed(a: str, b: str) -> list[float]:
        pairs = zip(found[a], found[b], strict=False)
        total = first.tokens.sum()
        return [float((mean_of([x]).on - mean_of([y]).on).sum() / total) for x, y in pairs]

    pairs = list(itertools.combinations(found, 2))
    common = {}
    for a, b in pairs:
        seeds = min(len(found[a]), len(found[b]))
        common[a, b] = mean_of(found[a][:seeds]), mean_of(found[b][:seeds])
    return {
        "seeds": {arm: len(seeds) for arm, seeds in found.items()},
        "documents": int(first.tokens.any(0).sum()),
        "parameters": {arm: seeds[0]["parameters"] for arm, seeds in found.items()},
        "segments": {arm: of.rows() for arm, of in losses.items()},
        "growth": {arm: of.growth() for arm, of in losses.items()},
        "difference": {f"{a} - {b}": difference(a, b) for a, b in pairs},
        "by_seed": {f"{a} - {b}": by_seed(a, b) for a, b in pairs},
    }


def show(figures: dict[str, Any]) -> None:
    """Print tables of losses, of differences between arms, of what each arm's memory is worth to it, and of learning
    rates if there are several."""
    segments = [row["segment"] for row in next(iter(figures["segments"].values()))]
    over = f"in thousandths of a nat ± standard error over {figures['documents']} documents"
    losses = Table("arm", "parameters", "seeds", *segments, title="loss by segment, nats per token")
    worth = Table(
        "arm",
        "",
        *segments,
        "growth",
        title=f"loss with memory off or of another document, minus that with it on, {over}",
    )
    for arm, rows in figures["segments"].items():
        counts = f"{figures['parameters'][arm]:,}", str(figures["seeds"][arm])
        losses.add_row(arm, *counts, *(f"{row['on']:.4f}" for row in rows))
        for key in ("off_minus_on", "other_minus_on") if arm != "local" else ():
            growth = figures["growth"][arm]
            cells = [cell(row[key], row[f"{key}_se"]) for row in (*rows, growth)]
            worth.add_row(arm, key.split("_")[0], *cells)
    differences = Table("arms", "by seed", *segments, title=f"losses on the same tokens, {over}")
    for pair, by_segment in figures["difference"].items():
        seeds = "\n".join(f"{1000 * value:+.1f}" for value in figures["by_seed"][pair])
        differences.add_row(pair.replace(" - ", "\n- "), seeds, *(cell(*pair) for pair in by_segment.values()))
    tried = [f"{lr:g}" for lr in next(iter(figures["rates"].values()))]
    rates = Table("arm", *tried, title="loss of seed 0 by learning rate; the lowest is the arm's in all else")
    for arm, of_arm in figures["rates"].items() if len(tried) > 1 else ():
        rates.add_row(arm, *(f"{loss:.4f}" for loss in of_arm.values()))
    console = Console(width=118)
    for table in (losses, differences, worth, rates):
        if table.row_count:
            console.print(table)


def cell(value: float | None, error: float | None) -> str:
    """A difference and its standard error, in thousandths of a nat."""
    return "-" if value is None else f"{1000 * value:+.1f}" + ("" if error is None else f"\n±{1000 * error:.1f}")


def signed(value: float | None, error: float | None) -> str:
    """A difference and its standard error in nats; empty in the first segment, where there is no memory."""
    return f"{value:.3f} ± {error:.3f}" if value is not None and error else ""


def report_tables(figures: dict[str, Any]) -> dict[str, Table]:
    """Our rule beside the two strongest arms without a memory, by segment; and beside all arms, by seed."""
    main = Table("segment", *COMPARED, OURS, *(f"minus {arm}" for arm in COMPARED), "off - on", "other - on")
    rows = [figures["segments"][arm] for arm in (*COMPARED, OURS)]
    for number, ours in enumerate(figures["segments"][OURS]):
        differences = (figures["difference"][f"{OURS} - {arm}"][ours["segment"]] for arm in COMPARED)
        worth = ((ours[key], ours[f"{key}_se"]) for key in ("off_minus_on", "other_minus_on"))
        losses = (f"{of_arm[number]['on']:.3f}" for of_arm in rows)
        main.add_row(ours["segment"], *losses, *(signed(*pair) for pair in (*differences, *worth)))
    seeds = Table("all segments, by seed", *map(str, range(figures["seeds"][OURS])))
    for pair, values in figures["by_seed"].items():
        if pair.startswith(f"{OURS} - "):
            seeds.add_row(pair.replace(f"{OURS} - ", "minus "), *(f"{value:.3f}" for value in values))
    return {"": main, "seeds": seeds}


def summary_of(figures: dict[str, Any]) -> dict[str, str]:
    over_all = (figures["difference"][f"{OURS} - {arm}"]["all"] for arm in COMPARED)
    what = f"loss on books, nats per token: {OURS} minus {', minus '.join(COMPARED)}"
    return {what: ", ".join(f"{value:+.3f} ± {error:.3f}" for value, error in over_all)}


def plot(path: Path, figures: dict[str, Any]) -> None:
    """Loss by segment of each arm, and its difference from the last arm's, with standard errors."""
    figure = plots.new_figure(11, 4.5)
    left, right = figure.subplots(1, 2)
    *others, last = figures["segments"]
    for arm, rows in figures["segments"].items():
        left.plot([row["segment"] for row in rows[:-1]], [row["on"] for row in rows[:-1]], marker=".", label=arm)
    for arm in others:
        by_segment = figures["difference"][f"{arm} - {last}"]
        places, (values, errors) = list(by_segment)[:-1], zip(*list(by_segment.values())[:-1], strict=True)
        right.errorbar(places, values, [e or 0 for e in errors], marker=".", capsize=2, label=arm)
    left.set(title="loss by segment", ylabel="nats per token")
    right.set(title=f"minus {last}, ± standard error over {figures['documents']} documents")
    right.axhline(0, color="grey", linestyle=":")
    for axes in (left, right):
        axes.set(xlabel="segment of the document")
        axes.tick_params(axis="x", rotation=45)
    left.legend()
    plots.save(figure, path)


def main(words: Sequence[str] | None = None) -> None:
    parser = results.parser(__doc__)
    parser.add_argument(
        "--data", type=Path, help="a directory of text files in train/ and valid/; default: the standard library"
    )
    parser.add_argument("--arms", nargs="*", choices=[[], *ARMS], default=list(ARMS))
    parser.add_argument("--steps", type=int, default=600, help=f"of {LANES * SEGMENTS * SEGMENT:,} tokens")
    parser.add_argument(
        "--lr", type=float, nargs="+", default=[2e-3], help="peak learning rates; each arm uses its best"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds; the paper's rules have one")
    parser.add_argument("--tokens", type=int, default=32768, help="number of tokens read of each validation document")
    parser.add_argument("--root", type=Path, default=Path("runs/memory-report/books"))
    options = parser.parse_args(words)
    for part in ("train", "valid") if options.data else ():
        if not (options.data / part).is_dir():
            parser.error(f"--data {options.data}: found no directory {part} in it")
    directory = options.root / (options.data.resolve().name if options.data else "stdlib")
    train, valid = prepare(options.data, directory)
    of = partial(measure, directory=directory, train=train, valid=valid, options=options)
    found, rates = {}, {}
    for arm in (arm for arm in ARMS if arm in options.arms):
        rates[arm] = {lr: mean_of([of(arm, lr, 0)]).rows()[-1]["on"] for lr in options.lr}
        best = min(options.lr, key=rates[arm].__getitem__)
        found[arm] = [of(arm, best, seed) for seed in range(seeds_of(arm, options.seeds))]
    if not found:
        return
    figures = {"rates": rates} | compare(found)
    show(figures)
    with atomic_file(directory / "report.json") as file:
        file.write(json.dumps(figures, indent=1).encode())
    plot(directory / "report.png", figures)
    print(json.dumps(figures))
    if options.results and {OURS, *COMPARED} <= set(found):
        results.write("books", report_tables(figures), figures, summary_of(figures), options.results)


if __name__ == "__main__":
    main()
