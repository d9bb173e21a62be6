"""Training speed as a share of the machine's best matrix product: `python -m benchmarks.limit`.

The share is the model FLOP/s (model/flops.py: the products that the maths needs) of forward and backward, divided by
the best rate of a float32 matrix product in the same round. 4 layers, heads of 64, segments of 256, one row.

A second table says on which operations a step of hidden size 256 spends its time (torch.profiler).
"""

import statistics
from functools import partial

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks import results
from benchmarks.memory_cost import build, step
from benchmarks.timing import interleaved
from infini_train.model import InfiniForCausalLM
from infini_train.model.flops import flops_per_token
from infini_train.training.allocator import configure_malloc
from infini_train.training.callbacks.throughput import measured_peak

CASES = ((256, 2048), (256, 8192), (512, 2048), (1024, 2048))  # hidden size, tokens
RULES, ROUNDS = ("paper-linear", "selective-delta"), 3
# The models of the second table, and the kinds of operations in it by parts of their names.
PROFILED: dict[str, tuple[str, dict[str, int]]] = {
    "paper-linear": ("paper-linear", {}),
    "selective-delta": ("selective-delta", {}),
    "the same, with a sliding window and an output memory": (
        "selective-delta",
        {"sliding_window": 512, "output_memory_dim": 32},
    ),
}
KINDS = {"matrix products": ("mm",), "local attention": ("scaled_dot_product",)}


def time_by_kind(model: InfiniForCausalLM, ids: torch.Tensor) -> dict[str, float]:
    """The share of a step's CPU time that each kind of operations takes, and all others together."""
    for _ in range(2):
        step(model, ids)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(ROUNDS):
            step(model, ids)
    spent = dict.fromkeys([*KINDS, "all others"], 0.0)
    for event in profiled.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), "all others")
        spent[kind] += event.self_cpu_time_total
    return {kind: time / sum(spent.values()) for kind, time in spent.items()}


def main() -> None:
    options = results.parser(__doc__).parse_args()
    configure_malloc()  # as in training
    table = Table("hidden size", "tokens", *RULES, "product, GFLOP/s", title="share of the best matrix product")
    found = {}
    for dim, length in CASES:
        ids, peaks = torch.randint(4096, (1, length)), list[float]()
        models = {rule: build(rule, dim) for rule in RULES}
        jobs = {rule: partial(step, model, ids) for rule, model in models.items()}
        jobs["product"] = partial(lambda peaks: peaks.append(max(map(measured_peak, (1024, 2048)))), peaks)
        seconds = interleaved(jobs, ROUNDS)
        shares = {}
        for rule, model in models.items():
            rates = (length * flops_per_token(model.config) / took for took in seconds[rule])
            shares[rule] = statistics.median(a / b for a, b in zip(rates, peaks[1:], strict=True))
        peak = statistics.median(peaks[1:])
        table.add_row(str(dim), f"{length:,}", *(f"{x:.2f}" for x in shares.values()), f"{peak / 1e9:.0f}")
        found[f"{dim}, {length}"] = {name: round(x, 3) for name, x in shares.items()} | {"peak": peak}
    spent, kinds = Table("model", "tokens", *KINDS, "all others"), {}
    for name, (rule, more) in PROFILED.items():
        for length in sorted({length for dim, length in CASES if dim == 256}):
            shares = time_by_kind(build(rule, 256, **more), torch.randint(4096, (1, length)))
            spent.add_row(name, f"{length:,}", *(f"{share:.2f}" for share in shares.values()))
            kinds[f"{name}, {length}"] = shares
    wide = [found[f"{dim}, 2048"] for dim in (512, 1024)]
    of_wide = "; ".join(", ".join(f"{case[rule]:.2f}" for case in wide) for rule in RULES)
    what = f"FLOP/s over the best float32 matrix product, hidden size 512 and 1,024: {'; '.join(RULES)}"
    figures = {"benchmark": "limit", "threads": torch.get_num_threads(), "results": found, "time": kinds}
    results.report("limit", {"": table, "time": spent}, figures, {what: of_wide}, options.results)


if __name__ == "__main__":
    main()
