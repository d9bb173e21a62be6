"""Training against peers at equal dims and parameters: `python -m benchmarks.peers`.

- Each memory rule: forward and backward of one window; paper-linear also with compiled layers.
- segment loop: the same model (paper-linear), one segment after the other through the whole network, with gradients
  through the whole window, as other implementations do it.
- infini-transformer-pytorch 0.2.1: its own wrapper with its defaults (a backward pass every two segments).
- llama: transformers' Llama with SDPA over the full context.

Float32, one row, vocabulary 4,096, a process for each. Steps take turns and medians are shown; at 32,768 tokens there
is one step each. Peak memory is the growth of the process. "FLOPs" are those of full attention over those of our
segments (model/flops.py), that is, what arithmetic alone could gain. Only a quiet machine gives useful figures.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context

import torch
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import results
from benchmarks.timing import growth_mib, interleaved, ratio, timed
from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.model.flops import flops_per_token
from infini_train.model.rules import RULES
from infini_train.training.allocator import configure_malloc
from infini_train.training.module import compile_layers

Shape = tuple[int, int, int, dict[int, int]]  # hidden size, heads, segment, lengths: rounds (0: one step each)
WIDE: Shape = 256, 4, 256, {2048: 9, 8192: 6, 32768: 0}
NARROW: Shape = 64, 1, 64, {2048: 5, 8192: 4}  # where the number of calls dominates, as on a GPU
VOCABULARY, LAYERS = 4096, 4
COMPILED, LOOP, PEER, LLAMA = "paper-linear, compiled", "segment loop", "infini-transformer-pytorch", "llama"
ARMS = (*RULES, COMPILED, LOOP, PEER, LLAMA)


def sizes(dim: int, heads: int) -> dict[str, int]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": dim,
        "intermediate_size": 11 * dim // 4,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }


def trainer(arm: str, dim: int, heads: int, segment: int) -> tuple[Callable[[torch.Tensor], None], int]:
    """A function that runs forward and backward of token ids [1, T] and drops the gradients; and the number of
    parameters."""
    torch.manual_seed(0)
    if arm == PEER:
        from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper

        # ff_mult makes its SwiGLU as wide as ours.
        shape = {"num_tokens": VOCABULARY, "dim": dim, "depth": LAYERS, "heads": heads, "dim_head": 64}
        peer = InfiniTransformerWrapper(InfiniTransformer(**shape, ff_mult=33 / 8), segment_length=segment)

        def step(ids: torch.Tensor) -> None:
            peer(ids, backward=True)
            peer.zero_grad()

        return step, sum(p.numel() for p in peer.parameters())
    if arm == LLAMA:
        llama = LlamaForCausalLM(LlamaConfig(**sizes(dim, heads), attn_implementation="sdpa"))

        def step(ids: torch.Tensor) -> None:
            llama(ids, labels=ids, use_cache=False).loss.backward()
            llama.zero_grad()

        return step, sum(p.numel() for p in llama.parameters())
    rule = arm if arm in RULES else "paper-linear"
    model = InfiniForCausalLM(InfiniConfig(**sizes(dim, heads), segment_length=segment, memory=rule)).train()
    if arm == COMPILED:
        compile_layers(model)

    def step(ids: torch.Tensor) -> None:
        memory, total = None, torch.zeros(())
        for part in ids.split(segment, 1) if arm == LOOP else (ids,):
            out = model.token_losses(part, part, memory=memory)
            memory, total = out.memory, total + out.total
        total.backward()
        model.zero_grad()

    return step, sum(p.numel() for p in model.parameters())


class Count(TorchDispatchMode):
    """Counts the operations that torch runs, each of which is at least one kernel on a GPU. Views do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        shared = isinstance(out, torch.Tensor) and out.untyped_storage()._cdata in tensors
        in_place = func._schema.name.endswith("_") or "out" in (kwargs or {})
        self.calls += not shared or in_place
        return out


def calls(step: Callable[[torch.Tensor], None], ids: torch.Tensor) -> int:
    with Count() as count:
        step(ids)
    return count.calls


answers: dict[str, Callable[[], float]] = {}  # filled in the process of an arm


def prepare(arm: str, shape: Shape, length: int) -> None:
    """Make this process answer "parameters", "calls", "step" (seconds) and "MiB", the growth in its first step.

    A step of two segments before it loads all libraries.
    """
    dim, heads, segment, _ = shape
    configure_malloc()  # as in training
    step, parameters = trainer(arm, dim, heads, segment)
    step(torch.randint(VOCABULARY, (1, 2 * segment)))
    ids = torch.randint(VOCABULARY, (1, length))
    answers["parameters"] = lambda: parameters
    answers["calls"] = lambda: calls(step, ids)
    answers["MiB"] = lambda: round(growth_mib(lambda: step(ids)))
    answers["step"] = lambda: timed(lambda: step(ids))


def answer(what: str) -> float:
    return answers[what]()


def answer_of(process: ProcessPoolExecutor, what: str) -> float:
    return process.submit(answer, what).result()


def measured(arms: tuple[str, ...], shape: Shape, length: int, rounds: int) -> dict[str, dict]:
    """Parameters, MiB, seconds, and at dim 64 the number of calls, of each arm.

    With rounds 0 the time is that of a second step. Where the first one took over a minute it counts itself: its
    page faults are then less than a hundredth. The compiled arm always takes a second step.
    """
    with ExitStack() as stack:
        # Forked processes need no imports; it is safe because torch has started no threads in this process.
        fork = get_context("fork")
        pools = {arm: ProcessPoolExecutor(1, fork, prepare, (arm, shape, length)) for arm in arms}
        asks = {arm: partial(answer_of, stack.enter_context(pool)) for arm, pool in pools.items()}
        found: dict[str, dict] = {arm: {"parameters": ask("parameters")} for arm, ask in asks.items()}
        for arm, ask in asks.items():
            begin = time.perf_counter()
            found[arm]["MiB"] = ask("MiB")
            first = time.perf_counter() - begin
            if not rounds:
                found[arm]["seconds"] = [first if first > 60 and arm != COMPILED else ask("step")]
            if shape is NARROW and arm != COMPILED:  # a compiled operator holds many operations
                found[arm]["calls"] = ask("calls")
        if rounds:
            seconds = interleaved({arm: partial(ask, "step") for arm, ask in asks.items()}, rounds)
            for arm in arms:
                found[arm]["seconds"] = seconds[arm]
    return found


def flops(dim: int, heads: int, segment: int) -> float:
    return flops_per_token(InfiniConfig(**sizes(dim, heads), segment_length=segment, memory="paper-linear"))


def compare(shape: Shape, lengths: list[int]) -> dict[str, dict]:
    """Figures by length."""
    dim, heads, segment, rounds = shape
    compared: dict[str, dict] = {}
    for length in lengths:
        together = [ARMS] if rounds[length] else [(arm,) for arm in ARMS]  # together they need too much memory
        found: dict[str, dict] = {}
        for arms in together:
            found |= measured(arms, shape, length, rounds[length])
        rates = {arm: length / statistics.median(found[arm]["seconds"]) for arm in ARMS}
        arithmetic = flops(dim, heads, length) / flops(dim, heads, segment)
        base = found["paper-linear"]["seconds"]
        compared[str(length)] = {
            "tokens/s": rates,
            "paper-linear over": {arm: round(ratio(found[arm]["seconds"], base), 3) for arm in ARMS},
            "details": {arm: {k: v for k, v in x.items() if k != "seconds"} for arm, x in found.items()},
            "FLOPs of full attention over": round(arithmetic, 3),
        }
    return compared


def tables(figures: dict[str, dict]) -> dict[str, Table]:
    """Speed, ratios and peak memory of the wide model, and the speed of the narrow one, with torch's calls a step."""
    made = {
        "": Table("tokens", *ARMS, "FLOPs", title="dim 256, segments of 256: training, tokens/s"),
        "ratios": Table("tokens", *ARMS, title="dim 256: time over paper-linear"),
        "memory": Table("tokens", *ARMS, title="dim 256: peak memory, MiB"),
        "narrow": Table("tokens", *ARMS, title="dim 64, segments of 64: tokens/s (torch calls a step)"),
    }
    for length, found in figures.get("dim 256", {}).items():
        tokens, details, over = f"{int(length):,}", found["details"], found["paper-linear over"]
        rates = (f"{found['tokens/s'][arm]:,.0f}" for arm in ARMS)
        made[""].add_row(tokens, *rates, f"{found['FLOPs of full attention over']:.2f}")
        made["ratios"].add_row(tokens, *(f"{over[arm]:.2f}" for arm in ARMS))
        made["memory"].add_row(tokens, *(f"{details[arm]['MiB']:,}" for arm in ARMS))
    for length, found in figures.get("dim 64", {}).items():
        calls = {arm: f" ({of['calls']:,})" if "calls" in of else "" for arm, of in found["details"].items()}
        made["narrow"].add_row(f"{int(length):,}", *(f"{found['tokens/s'][arm]:,.0f}{calls[arm]}" for arm in ARMS))
    return {name: table for name, table in made.items() if table.row_count}


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--lengths", nargs="*", type=int, help="only these numbers of tokens")
    options = parser.parse_args()
    found = {}
    for shape in (WIDE, NARROW):
        if lengths := [x for x in shape[3] if x in (options.lengths or shape[3])]:
            found[f"dim {shape[0]}"] = compare(shape, lengths)
    summary = {}
    if over := found.get("dim 256", {}).get("8192", {}).get("paper-linear over"):
        what = "training, paper-linear, 8,192 tokens: over infini-transformer-pytorch, full attention, segment loop"
        summary[what] = ", ".join(f"{over[arm]:.2f}" for arm in (PEER, LLAMA, LOOP)) + " x"
    figures = {"benchmark": "peers", "threads": torch.get_num_threads(), "results": found}
    results.report("peers", tables(found), figures, summary, options.results, width=150)


if __name__ == "__main__":
    main()
