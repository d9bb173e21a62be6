"""What each memory rule costs over local attention alone, forward and backward: `python -m benchmarks.memory_cost`,
as it is and with compiled layers, over local attention in the same form.

4 layers, as many heads of 64 as --dim has (a third of them key/value heads where that is a number), vocabulary 4,096,
segments of 256, one row, float32. Only a quiet machine gives useful figures.
"""

import argparse
import json
import statistics
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.baselines import convert
from benchmarks.timing import interleaved, ratio
from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.model.rules import RULES
from infini_train.training.allocator import keep_freed_blocks
from infini_train.training.module import compile_layers

ROUNDS = {2048: 16, 8192: 6}  # by tokens


def build(rule: str, dim: int = 256, layers: int = 4) -> InfiniForCausalLM:
    torch.manual_seed(0)
    heads = dim // 64
    sizes: dict[str, Any] = {"vocab_size": 4096, "hidden_size": dim, "intermediate_size": 11 * dim // 4}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads if heads % 3 else heads // 3}
    memory = "paper-linear" if rule == "local" else rule
    model = InfiniForCausalLM(InfiniConfig(**sizes, num_hidden_layers=layers, segment_length=256, memory=memory))
    return convert(model, "local") if rule == "local" else model


def step(model: InfiniForCausalLM, ids: torch.Tensor) -> None:
    """Forward and backward of one window, as in training."""
    model.lm_head(model.model(ids).last_hidden_state, ids)[0].backward()
    model.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--default-malloc", action="store_true", help="let glibc give freed blocks back")
    options = parser.parse_args()
    if not options.default_malloc:
        keep_freed_blocks()  # as in training
    over_local = (f"{rule} / local" for rule in RULES)
    table = Table("tokens", "layers", "local", *RULES, *over_local, title="tokens/s; time over local")
    results: dict[str, dict] = {}
    for how in ("as they are", "compiled"):
        models = {rule: build(rule, options.dim) for rule in ("local", *RULES)}
        if how == "compiled":
            for model in models.values():
                compile_layers(model)
        for length, rounds in ROUNDS.items():
            ids = torch.randint(4096, (1, length))
            seconds = interleaved({rule: partial(step, model, ids) for rule, model in models.items()}, rounds)
            cost = {rule: ratio(times, seconds["local"]) for rule, times in seconds.items()}
            rates = (f"{length / statistics.median(times):,.0f}" for times in seconds.values())
            table.add_row(f"{length:,}", how, *rates, *(f"{cost[rule]:.3f}" for rule in RULES))
            results[f"{length}, {how}"] = {rule: round(value, 4) for rule, value in cost.items()}
    Console(width=150).print(table)
    print(json.dumps({"time_over_local_attention": results, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
