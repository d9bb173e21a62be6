"""Time of a sliding window over segment-only attention: `python -m benchmarks.sliding_window`.

Forward and backward at dim 256: 4 layers, 4 heads of 64, vocabulary 4,096, segments of 256, one row, float32, with a
carried state, so that the first segment sees the one before. Only a quiet machine gives useful figures.
"""

import statistics
from functools import partial

import torch
from rich.table import Table

from benchmarks import results
from benchmarks.memory_cost import build
from benchmarks.timing import interleaved, ratio
from infini_train.model import InfiniForCausalLM
from infini_train.training.allocator import configure_malloc

ROUNDS = {2048: 8, 8192: 4}  # by tokens
RULES = ("paper-linear", "selective-delta")
WINDOWS = {"none": None, "S": 256, "2S": 512}


def sliding(rule: str, window: int | None) -> InfiniForCausalLM:
    model = build(rule)
    model.config.sliding_window = window
    return model


def step(model: InfiniForCausalLM, ids: torch.Tensor) -> None:
    """Forward and backward of one window, as in training."""
    model.token_losses(ids, ids).total.backward()
    model.zero_grad()


def main() -> None:
    options = results.parser(__doc__).parse_args()
    configure_malloc()  # as in training
    table = Table("rule", "tokens", "tokens/s", "sliding_window S", "2S", title="time over segment-only attention")
    found: dict[str, dict[str, float]] = {}
    for rule in RULES:
        models = {name: sliding(rule, window) for name, window in WINDOWS.items()}
        for length, rounds in ROUNDS.items():
            ids = torch.randint(4096, (1, length))
            seconds = interleaved({name: partial(step, model, ids) for name, model in models.items()}, rounds)
            ratios = {name: round(ratio(times, seconds["none"]), 4) for name, times in seconds.items()}
            rate = length / statistics.median(seconds["none"])
            table.add_row(rule, f"{length:,}", f"{rate:,.0f}", f"{ratios['S']:.3f}", f"{ratios['2S']:.3f}")
            found[f"{rule}, {length}"] = ratios
    summary = {
        "time of a sliding window of one segment over segment-only attention, 8,192 tokens: " + ", ".join(RULES): (
            ", ".join(f"{found[f'{rule}, 8192']['S']:.2f}" for rule in RULES) + " x"
        )
    }
    figures = {"time_over_segment_only": found, "threads": torch.get_num_threads()}
    results.report("sliding_window", {"": table}, figures, summary, options.results)


if __name__ == "__main__":
    main()
