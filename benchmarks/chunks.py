"""Windows in chunks against recomputed layers and whole windows, in memory and time: `python -m benchmarks.chunks`.

Forward and backward of one window at dim 256: 4 layers, 4 heads of 64, vocabulary 4,096, segments of 256, one row,
float32, with malloc configured as in training. Memory is what a process of its own grows by. The second table has
windows of selective-delta in chunks of 16 segments, up to --longest tokens. The third compares loss and gradients of
windows twice as long as those of the first, whole and in chunks of 4 segments, which takes 12 GiB at 65,536 tokens.
Every figure is also printed as soon as it is measured. Only a quiet machine gives useful times. It takes half an
hour. The results say whether malloc is glibc's or was preloaded (LD_PRELOAD=libjemalloc.so.2).
"""

import json
import statistics
import time
from typing import Any

import torch
from rich.table import Table

from benchmarks import results
from benchmarks.memory_cost import build
from benchmarks.timing import child, growth_mib, ratio, timed
from infini_train.model import InfiniForCausalLM
from infini_train.training.allocator import configure_malloc, has_glibc_malloc
from infini_train.training.chunks import window_losses

ROUNDS = 2
RULES = ("paper-linear", "selective-delta")
WHOLE, LAYERS = "whole window", "activation_checkpointing"
WAYS: dict[str, dict[str, Any]] = {
    WHOLE: {},
    LAYERS: {"recompute": True},
    "chunks of 16 segments": {"chunk": 16},
    "chunks of 8 segments": {"chunk": 8},
    "chunks of 4 segments": {"chunk": 4},
    "chunks of 16 segments, recomputed layers": {"chunk": 16, "recompute": True},
}
LONG = 16  # segments of a chunk in the second table
TIMED = 131_072  # tokens over which a step of the second table is repeated


def model_of(rule: str, chunk: int | None = None, recompute: bool = False) -> InfiniForCausalLM:
    model = build(rule).train()
    if recompute:
        model.activation_checkpointing_enable()
    return model


def step(model: InfiniForCausalLM, ids: torch.Tensor, chunk: int | None = None, recompute: bool = False) -> None:
    configure_malloc(chunked=chunk is not None)  # as in training
    window_losses(model, ids, ids, segments_per_chunk=chunk).total.backward()
    model.zero_grad()


def one(rule: str, how: dict[str, Any], tokens: int, repeats: int) -> dict[str, float]:
    """Memory in MiB that a step takes, and its seconds, in a process of its own; those of `repeats` further steps, if
    there are any, because a short step takes as long for its first touch of the memory."""
    model, small = model_of(rule, **how), torch.zeros(1, 256, dtype=torch.long)
    step(model, small, **how)  # what libraries set up
    ids = torch.randint(4096, (1, tokens))
    begin = time.perf_counter()
    grown = growth_mib(lambda: step(model, ids, **how))
    seconds = time.perf_counter() - begin
    if repeats:
        seconds = timed(lambda: [step(model, ids, **how) for _ in range(repeats)]) / repeats
    return {"MiB": grown, "seconds": seconds}


def difference(rule: str, tokens: int) -> dict[str, float]:
    """How far a window in chunks is from the whole one, relative to the whole one: the loss, and the norm of the
    difference of all gradients."""
    model, ids, found = model_of(rule), torch.randint(4096, (1, tokens)), []
    configure_malloc(chunked=True)
    for chunk in (None, 4):
        total = window_losses(model, ids, ids, segments_per_chunk=chunk).total
        total.backward()
        found.append((total.item(), [p.grad for p in model.parameters()]))
        model.zero_grad()
    (loss, whole), (chunked_loss, chunked) = found
    apart = sum((a - b).double().square().sum() for a, b in zip(whole, chunked, strict=True))
    norm = sum(a.double().square().sum() for a in whole)
    return {"loss": abs(chunked_loss / loss - 1), "gradients": (apart / norm).sqrt().item()}


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens of the window of the first table")
    parser.add_argument("--longest", type=int, default=1_048_576, help="tokens of the longest window")
    parser.add_argument("--difference", nargs=2, metavar=("RULE", "TOKENS"), help="compare gradients in this process")
    names = ("RULE", "HOW", "TOKENS", "REPEATS")
    parser.add_argument("--one", nargs=4, metavar=names, help="measure one step in this process")
    options = parser.parse_args()
    if options.one:
        rule, how, *numbers = options.one
        print(json.dumps(one(rule, json.loads(how), *map(int, numbers))))
        return

    if options.difference:
        rule, tokens = options.difference
        print(json.dumps(difference(rule, int(tokens))))
        return

    table = Table("rule", "way", "memory, MiB", "of the whole window's", "s", "over the whole window's")
    found: dict[str, dict[str, float]] = {}
    for rule in RULES:
        # In processes of their own, which take turns: what one leaves in its heap does not help another.
        rounds = [
            {way: child("chunks", "--one", rule, json.dumps(how), options.tokens, 1) for way, how in WAYS.items()}
            for _ in range(ROUNDS)
        ]
        seconds = {way: [one_round[way]["seconds"] for one_round in rounds] for way in WAYS}
        for way in WAYS:
            grown = statistics.median(one_round[way]["MiB"] for one_round in rounds)
            here = {"MiB": grown, "seconds": statistics.median(seconds[way])}
            here["time over whole"] = ratio(seconds[way], seconds[WHOLE])
            here["memory over whole"] = grown / found.get(f"{rule}, {WHOLE}", here)["MiB"]
            found[f"{rule}, {way}"] = here
            print(f"{rule}, {way}: {here}", flush=True)
            shares = f"{here['memory over whole']:.2f}", f"{here['seconds']:.1f}", f"{here['time over whole']:.2f}"
            table.add_row(rule, way, f"{grown:,.0f}", *shares)

    longer = Table("tokens of the window", "memory, MiB", "over 16,384", "tokens/s")
    long: dict[int, dict[str, float]] = {}
    for tokens in sorted({16_384, min(131_072, options.longest), options.longest}):
        how = json.dumps({"chunk": LONG})
        here = child("chunks", "--one", "selective-delta", how, tokens, TIMED // tokens)
        long[tokens] = here
        print(f"window of {tokens:,} tokens: {here}", flush=True)
        over = here["MiB"] / long[16_384]["MiB"]
        longer.add_row(f"{tokens:,}", f"{here['MiB']:,.0f}", f"{over:.2f}", f"{tokens / here['seconds']:,.0f}")

    exact, apart = Table("rule", "tokens of the window", "loss", "gradients", title="relative difference"), {}
    for rule in RULES:
        apart[rule] = child("chunks", "--difference", rule, 2 * options.tokens)
        print(f"{rule}, relative difference: {apart[rule]}", flush=True)
        exact.add_row(rule, f"{2 * options.tokens:,}", *(f"{apart[rule][of]:.1e}" for of in ("loss", "gradients")))

    some = [found[f"{rule}, chunks of {LONG} segments"] for rule in RULES]
    summary = {
        f"a window of {options.tokens:,} tokens in chunks of {LONG} segments over a whole one, memory and time: "
        + ", ".join(RULES): "; ".join(f"{f['memory over whole']:.2f}, {f['time over whole']:.2f} x" for f in some),
        f"memory of a window of {options.longest:,} tokens over one of 16,384, both in chunks of {LONG} segments": (
            f"{long[options.longest]['MiB'] / long[16_384]['MiB']:.2f} x"
        ),
    }
    figures = {"ways": found, "windows": long, "difference": apart, "threads": torch.get_num_threads()}
    figures["malloc"] = "glibc" if has_glibc_malloc() else "preloaded"
    results.report("chunks", {"": table, "long": longer, "difference": exact}, figures, summary, options.results)


if __name__ == "__main__":
    main()
