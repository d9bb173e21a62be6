"""Time of each memory rule over local attention alone, forward and backward: `python -m benchmarks.memory_cost`.

Measured without and with compiled layers, over local attention in the same form. 4 layers, --dim / 64 heads of 64 (a
third as many key/value heads where that is a whole number), vocabulary 4,096, segments of 256, one row, float32. Only
a quiet machine gives useful figures.
"""

import statistics
from functools import partial
from typing import Any

import torch
from rich.table import Table

from benchmarks import results
from benchmarks.baselines import convert
from benchmarks.timing import interleaved, ratio
from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.model.rules import RULES
from infini_train.training.allocator import configure_malloc
from infini_train.training.module import compile_layers

ROUNDS = {2048: 16, 8192: 6}  # by tokens


def build(rule: str, dim: int = 256, layers: int = 4, **options: Any) -> InfiniForCausalLM:
    torch.manual_seed(0)
    heads = dim // 64
    sizes: dict[str, Any] = {"vocab_size": 4096, "hidden_size": dim, "intermediate_size": 11 * dim // 4}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads if heads % 3 else heads // 3}
    sizes |= {"memory": "paper-linear" if rule == "local" else rule, **options}
    model = InfiniForCausalLM(InfiniConfig(**sizes, num_hidden_layers=layers, segment_length=256))
    return convert(model, "local") if rule == "local" else model


def step(model: InfiniForCausalLM, ids: torch.Tensor) -> None:
    """Forward and backward of one window, as in training."""
    model.token_losses(ids, ids).total.backward()
    model.zero_grad()


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--default-malloc", action="store_true", help="let glibc give freed blocks back")
    options = parser.parse_args()
    if not options.default_malloc:
        configure_malloc()  # as in training
    speed = Table("tokens", "layers", "local", *RULES, title="tokens/s")
    cost = Table("tokens", "layers", *RULES, title="time over local attention alone")
    found: dict[str, dict] = {}
    for how in ("as they are", "compiled"):
        models = {rule: build(rule, options.dim) for rule in ("local", *RULES)}
        if how == "compiled":
            for model in models.values():
                compile_layers(model)
        for length, rounds in ROUNDS.items():
            ids = torch.randint(4096, (1, length))
            seconds = interleaved({rule: partial(step, model, ids) for rule, model in models.items()}, rounds)
            ratios = {rule: ratio(times, seconds["local"]) for rule, times in seconds.items()}
            rates = (f"{length / statistics.median(times):,.0f}" for times in seconds.values())
            speed.add_row(f"{length:,}", how, *rates)
            cost.add_row(f"{length:,}", how, *(f"{ratios[rule]:.3f}" for rule in RULES))
            found[f"{length}, {how}"] = {rule: round(value, 4) for rule, value in ratios.items()}
    chosen = found["8192, as they are"]
    what = f"time over local attention alone, 8,192 tokens: {', '.join(RULES)}"
    summary = {what: ", ".join(f"{chosen[rule]:.2f}" for rule in RULES) + " x"}
    figures = {"time_over_local_attention": found, "threads": torch.get_num_threads()}
    results.report("memory_cost", {"speed": speed, "": cost}, figures, summary, options.results, width=150)


if __name__ == "__main__":
    main()
