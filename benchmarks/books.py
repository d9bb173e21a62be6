"""Does the memory help on real books? `python -m benchmarks.books --data DIR`, of texts in DIR/train and DIR/valid.

An arm is a small model with one of the memory rules, or of another kind (baselines.py). Arms are trained with the
same seed, batches, steps and optimizer, and have about the same parameters. Each then reads the beginnings of
documents that it has never seen; losses are kept by document and segment, and arms are compared document by document.
Settings are chosen on DIR/valid (`--part valid`). What is reported is measured on a part of DIR/train that is held
out from training and choosing, the default.

An arm's name may end in `-equal-time`: it is then trained for as many steps as take the time of our arm's.
`full-attention` reads contexts of 2,048 tokens, one after the other and each from nothing, and so does every arm in
the table of contexts.

Finished arms are kept and not repeated, and a run that was cut off resumes from its checkpoint. `--arms` without a
name only prepares the data; after that, several of these commands may train different arms at the same time.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import results
from benchmarks.baselines import Baseline, convert, load
from benchmarks.commands import run
from benchmarks.timing import interleaved
from benchmarks.timing import ratio as time_ratio
from infini_train import plots
from infini_train.data.batches import PlannedBatches
from infini_train.data.index import DatasetIndex
from infini_train.data.plans import validation_plans
from infini_train.data.remote import reader_of
from infini_train.evaluation.segments import SegmentLosses, segment_losses
from infini_train.files import atomic_file
from infini_train.metrics.buckets import bucket_name, bucket_of
from infini_train.metrics.ratios import ratio
from infini_train.model import InfiniConfig, InfiniForCausalLM

BASELINES: tuple[Baseline, ...] = get_args(Baseline)
OURS, COMPARED = "output-memory", ("transformer-xl-convolved", "empty")
SEGMENT, SEGMENTS, LANES = 128, 16, 2
RULE, FEATURES = "selective-delta", 32
FULL, EQUAL_TIME = "full-attention", "-equal-time"
TEST_FRACTION = 0.15
# Options of the arms that are not simply a rule or a baseline: our rule with local attention to the last S tokens,
# and to the own segment and the whole one before; the latter with an output memory; an output memory alone; and full
# attention within a whole window.
OPTIONS_OF: dict[str, dict[str, Any]] = {
    f"{RULE}-{SEGMENT}": {"model.memory": RULE, "model.sliding_window": SEGMENT},
    f"{RULE}-{2 * SEGMENT}": {"model.memory": RULE, "model.sliding_window": 2 * SEGMENT},
    OURS: {"model.memory": RULE, "model.sliding_window": 2 * SEGMENT, "model.output_memory_dim": FEATURES},
    "output-memory-alone": {"model.baseline": COMPARED[0], "model.output_memory_dim": FEATURES},
    FULL: {"model.baseline": "local", "data.segment_length": SEGMENTS * SEGMENT, "data.segments_per_window": 1},
}
EQUAL = (f"{COMPARED[0]}{EQUAL_TIME}",)
REPORTED = (OURS, *COMPARED, "sliding-window-convolved", "gated-deltanet", FULL, *EQUAL)
ARMS = tuple(dict.fromkeys((*REPORTED, *OPTIONS_OF, RULE, "paper-delta", "paper-linear", *BASELINES)))
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


def prepare(data: Path | None, directory: Path) -> Path:
    """Make tokenizer and shards, unless they exist; returns the directory of the datasets train, valid and test."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer, shards = directory / "tokenizer.model", directory / "shards"
    train = data / "train" if data else directory / "documents.jsonl.gz"
    if not data:
        run("data_prep", "collect-stdlib", train)
    run("data_prep", "tokenizer", train, "--out", tokenizer, "--vocab-size", str(OPTIONS["model.vocab_size"]))
    split = "--test_fraction", str(TEST_FRACTION), *(() if data else ("--validation_fraction", "0.05"))
    run("data_prep", "shard", "--tokenizer", tokenizer, train, "--out", shards, *split)
    if data:
        run("data_prep", "shard", "--tokenizer", tokenizer, data / "valid", "--out", directory / "valid")
    return shards


def options_of(arm: str) -> dict[str, Any]:
    """Return the options that an arm adds to OPTIONS."""
    arm = arm.removesuffix(EQUAL_TIME)
    found = OPTIONS_OF.get(arm, {"model.baseline" if arm in BASELINES else "model.memory": arm})
    convolved = found.get("model.baseline", "").endswith(("convolved", "deltanet", "empty"))
    return {"model.memory": RULE if convolved else "paper-linear"} | found


def relative_times(directory: Path) -> dict[str, float]:
    """Return the times of a step (forward and backward) of the arms that need them, relative to our arm's.

    They are measured once, in rounds and on one thread, because numbers of steps follow from them.
    """
    out = directory / "times.json"
    if not out.exists():
        torch.set_num_threads(1)
        tokens = torch.randint(OPTIONS["model.vocab_size"], (LANES, SEGMENTS * SEGMENT))
        names = {field.name for field in fields(InfiniConfig)}

        def step(model: InfiniForCausalLM) -> None:
            model.token_losses(tokens, tokens).total.backward()

        jobs = {}
        for arm in (OURS, COMPARED[0], FULL):
            of_model = OPTIONS | options_of(arm)
            given = {name: value for name in names if (value := of_model.get(f"model.{name}")) is not None}
            given["tie_word_embeddings"] = True
            model = InfiniForCausalLM(InfiniConfig(**given, segment_length=of_model["data.segment_length"]))
            if baseline := of_model.get("model.baseline"):
                convert(model, baseline)
            jobs[arm] = partial(step, model)
        seconds = interleaved(jobs, rounds=9)
        times = {arm: time_ratio(of_arm, seconds[OURS]) for arm, of_arm in seconds.items()}
        with atomic_file(out) as file:
            file.write(json.dumps(times).encode())
    return json.loads(out.read_text())


def steps_of(arm: str, steps: int, directory: Path) -> int:
    if not arm.endswith(EQUAL_TIME):
        return steps
    return round(steps / relative_times(directory)[arm.removesuffix(EQUAL_TIME)])


@torch.inference_mode()
def context_losses(model: InfiniForCausalLM, index: DatasetIndex, tokens: int) -> SegmentLosses:
    """Read the beginnings of documents in contexts of 2,048 tokens, each of which knows nothing of the one before.

    Args:
        model: the model.
        index: the documents.
        tokens: number of tokens read of each.

    Returns:
        sums of losses by document and bucket of segments of 128 tokens; the conditions without a memory and with
        another's are the same.
    """
    context, unit = SEGMENTS * SEGMENT, model.config.segment_length
    plans = validation_plans(
        index.tokens_D, rows=8, rank=0, world_size=1, segment_length=unit, window=context, limit=tokens
    )
    longest = np.argsort(-index.tokens_D, kind="stable")  # the order of `segment_losses`
    column_D = np.argsort(longest)
    batches = PlannedBatches(reader_of(index))
    on, count = (np.zeros((1 + bucket_of(-(-tokens // SEGMENT) - 1), len(longest))) for _ in range(2))
    for plan in plans:
        batch, rows = batches[plan], plan.slices.lane
        labels = batch["labels"][rows]
        losses = model.token_losses(batch["input_ids"][rows], labels).losses.double()
        first = int(plan.slices.offset[0]) // SEGMENT
        for number, part in enumerate(zip(losses.split(SEGMENT, 1), labels.split(SEGMENT, 1), strict=True)):
            here = bucket_of(first + number), column_D[plan.slices.doc]
            on[here] += part[0].sum(1).numpy()
            count[here] += (part[1] >= 0).sum(1).numpy()
    return SegmentLosses(on=on, off=on, compared_on=on, other=on, tokens=count, compared=np.zeros_like(count))


def measure(arm: str, lr: float, seed: int, directory: Path, shards: Path, options: argparse.Namespace) -> Any:
    """Train an arm and read the documents of a part, unless that is done; returns what was saved.

    `losses` and `contexts` hold the fields of SegmentLosses, of documents read from their beginning and in contexts:
    sums over the tokens of each document and bucket of segments.
    """
    steps = steps_of(arm, options.steps, directory)
    part = directory / "valid" if options.part == "valid" and options.data else shards / options.part
    directory = directory / f"{arm}-lr{lr:g}-steps{options.steps}-seed{seed}"
    out = directory / f"losses-{options.part}-{options.tokens}.json"
    if not out.exists():
        given = OPTIONS | {"model.seed": seed, "data.seed": seed, "model.optimizer.lr": lr} | options_of(arm)
        given |= {"trainer.max_steps": steps, "model.optimizer.warmup_steps": max(1, steps // 10)}
        baseline = given.get("model.baseline")
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        program = "benchmarks.baselines" if baseline else "infini_train"
        run(program, "fit", "--run", directory, *words, "--data.train", shards / "train", "--ckpt_path", "last")
        index = DatasetIndex.load(part)
        model = load(directory / "checkpoints", baseline)
        contexts = context_losses(model, index, options.tokens)
        full = arm == FULL
        losses = contexts if full else segment_losses(model, index, max_tokens=options.tokens, rows=16)[0]
        found = {
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "steps": steps,
            "losses": {name: array.tolist() for name, array in asdict(losses).items()},
            "contexts": {name: array.tolist() for name, array in asdict(contexts).items()},
        }
        with atomic_file(out) as file:
            file.write(json.dumps(found).encode())
    return json.loads(out.read_text())


def seeds_of(arm: str, seeds: int) -> int:
    return seeds if arm in (OURS, *COMPARED) else 1


def mean_of(seeds: list[dict[str, Any]], kind: str = "losses") -> SegmentLosses:
    return SegmentLosses(**{name: np.mean([one[kind][name] for one in seeds], 0) for name in seeds[0][kind]})


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
        raise ValueError(f"{', '.join(wrong)}: found other tokens than of {next(iter(found))}")
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
    """Our rule beside the two arms closest to it, by segment; and beside all arms."""
    main = Table("segment", *COMPARED, OURS, *(f"minus {arm}" for arm in COMPARED), "off - on", "other - on")
    rows = [figures["segments"][arm] for arm in (*COMPARED, OURS)]
    for number, ours in enumerate(figures["segments"][OURS]):
        differences = (figures["difference"][f"{OURS} - {arm}"][ours["segment"]] for arm in COMPARED)
        worth = ((ours[key], ours[f"{key}_se"]) for key in ("off_minus_on", "other_minus_on"))
        losses = (f"{of_arm[number]['on']:.3f}" for of_arm in rows)
        main.add_row(ours["segment"], *losses, *(signed(*pair) for pair in (*differences, *worth)))
    what = "arm", "parameters", "steps", "loss", "in contexts of 2,048", f"{OURS} minus it", "by seed"
    arms = Table(*what)
    for arm, of_arm in figures["segments"].items():
        counts = f"{figures['parameters'][arm]:,}", f"{figures['steps'][arm]:,}"
        losses = f"{of_arm[-1]['on']:.3f}", f"{figures['contexts'][arm]:.3f}"
        pair = f"{OURS} - {arm}"
        seeds = ", ".join(f"{value:.3f}" for value in figures["by_seed"].get(pair, []))
        difference = signed(*figures["difference"][pair]["all"]) if arm != OURS else ""
        arms.add_row(arm, *counts, *losses, difference, seeds)
    return {"": main, "arms": arms}


def summary_of(figures: dict[str, Any]) -> dict[str, str]:
    over_all = (figures["difference"][f"{OURS} - {arm}"]["all"] for arm in COMPARED)
    what = "loss on books, nats a token, over Transformer-XL with a convolution; over an empty memory"
    return {what: "; ".join(f"{value:+.3f} ± {error:.3f}" for value, error in over_all)}


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
    parser.add_argument("--arms", nargs="*", choices=[[], *ARMS], default=list(REPORTED))
    parser.add_argument("--steps", type=int, default=600, help=f"of {LANES * SEGMENTS * SEGMENT:,} tokens")
    parser.add_argument(
        "--lr", type=float, nargs="+", default=[2e-3], help="peak learning rates; each arm uses its best"
    )
    what = f"number of seeds of {OURS}, {' and '.join(COMPARED)}; other arms have one"
    parser.add_argument("--seeds", type=int, default=3, help=what)
    parser.add_argument("--tokens", type=int, default=65536, help="number of tokens read of each document")
    parser.add_argument("--part", choices=("valid", "test"), default="test", help="the documents read")
    parser.add_argument("--root", type=Path, default=Path("runs/memory-report/books"))
    options = parser.parse_args(words)
    for part in ("train", "valid") if options.data else ():
        if not (options.data / part).is_dir():
            parser.error(f"--data {options.data}: found no directory {part} in it")
    directory = options.root / (options.data.resolve().name if options.data else "stdlib")
    of = partial(measure, directory=directory, shards=prepare(options.data, directory), options=options)
    found, rates = {}, {}
    for arm in (arm for arm in ARMS if arm in options.arms):
        rates[arm] = {lr: mean_of([of(arm, lr, 0)]).rows()[-1]["on"] for lr in options.lr}
        best = min(options.lr, key=rates[arm].__getitem__)
        found[arm] = [of(arm, best, seed) for seed in range(seeds_of(arm, options.seeds))]
    if not found:
        return
    figures = {"rates": rates} | compare(found)
    figures["steps"] = {arm: seeds[0]["steps"] for arm, seeds in found.items()}
    figures["contexts"] = {arm: mean_of(seeds, "contexts").rows()[-1]["on"] for arm, seeds in found.items()}
    figures["relative_times"] = relative_times(directory)
    show(figures)
    with atomic_file(directory / "report.json") as file:
        file.write(json.dumps(figures, indent=1).encode())
    plot(directory / "report.png", figures)
    print(json.dumps(figures))
    if options.results and {OURS, *COMPARED} <= set(found):
        results.write("books", report_tables(figures), figures, summary_of(figures), options.results)


if __name__ == "__main__":
    main()
