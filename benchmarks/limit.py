"""Training speed as a share of the machine's best matrix product: `python -m benchmarks.limit`.

The share is the model FLOP/s (model/flops.py: the products that the maths needs) of forward and backward, divided by
the best rate of a float32 matrix product in the same round. 4 layers, heads of 64, segments of 256, one row.
"""

import statistics
from functools import partial

import torch
from rich.table import Table

from benchmarks import results
from benchmarks.memory_cost import build, step
from benchmarks.timing import interleaved
from infini_train.model.flops import flops_per_token
from infini_train.training.allocator import configure_malloc
from infini_train.training.callbacks.throughput import measured_peak

CASES = ((256, 2048), (256, 8192), (512, 2048), (1024, 2048))  # hidden size, tokens
RULES, ROUNDS = ("paper-linear", "selective-delta"), 3


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
    wide = [found[f"{dim}, 2048"] for dim in (512, 1024)]
    shares = "; ".join(", ".join(f"{case[rule]:.2f}" for case in wide) for rule in RULES)
    what = f"FLOP/s over the best float32 matrix product, hidden size 512 and 1,024: {'; '.join(RULES)}"
    figures = {"benchmark": "limit", "threads": torch.get_num_threads(), "results": found}
    results.report("limit", {"": table}, figures, {what: shares}, options.results)


if __name__ == "__main__":
    main()
