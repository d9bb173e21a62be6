"""Training against peers at equal dims and parameters: `python -m benchmarks.peers`.

ours: forward and backward of one window, each memory rule, paper-linear with compiled layers, too. segment loop: the
same model (paper-linear), one segment after the other through the whole network, gradients through all of the window:
what other implementations do.
infini-transformer-pytorch 0.2.1: its own wrapper with its defaults (a backward every two segments). llama:
transformers' Llama with SDPA over the full context. Float32, one row, vocabulary 4,096.

Each has a process of its own. Steps take turns and medians are shown, but of 32,768 tokens there is one step each.
Peak memory is what the process grows by. "FLOPs" is what full attention computes over what segments of ours do
(model/flops.py): what could be gained by arithmetic alone. Only on a quiet machine.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import growth_mib, interleaved, ratio, timed
from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.model.flops import flops_per_token
from infini_train.model.rules import RULES
from infini_train.training.allocator import keep_freed_blocks
from infini_train.training.module import compile_layers

Shape = tuple[int, int, int, dict[int, int]]  # hidden size, heads, segment, lengths: rounds (0: all but at once)
WIDE: Shape = 256, 4, 256, {2048: 9, 8192: 6, 32768: 0}
NARROW: Shape = 64, 1, 64, {2048: 5, 8192: 4}  # where the number of calls rules, as launches do on a GPU
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
    """Forward and backward of token ids [1, T], gradients dropped afterwards; and the number of parameters."""
    torch.manual_seed(0)
    if arm == PEER:
        from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper

        # A SwiGLU as wide as ours, in its terms.
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
            out = model.model(part, memory=memory)
            memory = out.memory
            total = total + model.lm_head(out.last_hidden_state, part)[0]
        total.backward()
        model.zero_grad()

    return step, sum(p.numel() for p in model.parameters())


class Count(TorchDispatchMode):
    """Operations that torch runs, each at least a kernel on a GPU; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        shared = isinstance(out, torch.Tensor) and out.untyped_storage()._cdata in tensors
        written = func._schema.name.endswith("_") or "out" in (kwargs or {})  # in place is no view
        self.calls += not shared or written
        return out


def calls(step: Callable[[torch.Tensor], None], ids: torch.Tensor) -> int:
    with Count() as count:
        step(ids)
    return count.calls


answers: dict[str, Callable[[], float]] = {}  # of the process of one arm


def prepare(arm: str, shape: Shape, length: int) -> None:
    """Let this process answer to "parameters", "calls", "step" (seconds) and "MiB" by which a first step grows it,
    after one of two segments, so that libraries are loaded."""
    dim, heads, segment, _ = shape
    keep_freed_blocks()  # as in training
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
    """Parameters, MiB, seconds and at dim 64 calls of each arm; rounds 0: a second step alone, or, if the first
    took long, that, whose page faults then are under one in a hundred (but not if it was compiled in it)."""
    with ExitStack() as stack:
        # Forked, so that they need not import all again: torch has no threads in this process.
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
            if shape is NARROW and arm != COMPILED:  # whose operators hold many
                found[arm]["calls"] = ask("calls")
        if rounds:
            seconds = interleaved({arm: partial(ask, "step") for arm, ask in asks.items()}, rounds)
            for arm in arms:
                found[arm]["seconds"] = seconds[arm]
    return found


def flops(dim: int, heads: int, segment: int) -> float:
    return flops_per_token(InfiniConfig(**sizes(dim, heads), segment_length=segment, memory="paper-linear"))


def compare(shape: Shape, lengths: list[int]) -> dict[str, dict]:
    dim, heads, segment, rounds = shape
    results: dict[str, dict] = {}
    table = Table("tokens", *ARMS, "FLOPs")
    table.title = f"training, tokens/s; parameters, peak memory, torch calls a step; dim {dim}, segments of {segment}"
    for length in lengths:
        together = [ARMS] if rounds[length] else [(arm,) for arm in ARMS]  # all at once need too much memory
        found: dict[str, dict] = {}
        for arms in together:
            found |= measured(arms, shape, length, rounds[length])
        rates = {arm: length / statistics.median(found[arm]["seconds"]) for arm in ARMS}
        cells = []
        for arm in ARMS:
            details = f"{found[arm]['parameters'] / 1e6:.2f} M", f"{found[arm]['MiB']:,} MiB"
            details += (f"{found[arm]['calls']:,} calls",) if "calls" in found[arm] else ()
            cells.append("\n".join((f"{rates[arm]:,.0f}", *details)))
        arithmetic = flops(dim, heads, length) / flops(dim, heads, segment)
        table.add_row(f"{length:,}", *cells, f"{arithmetic:.2f}")
        base = found["paper-linear"]["seconds"]
        results[str(length)] = {
            "tokens/s": rates,
            "paper-linear over": {arm: round(ratio(found[arm]["seconds"], base), 3) for arm in ARMS},
            "details": {arm: {k: v for k, v in x.items() if k != "seconds"} for arm, x in found.items()},
            "FLOPs of full attention over": round(arithmetic, 3),
        }
    Console(width=150).print(table)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="*", type=int, help="only these numbers of tokens")
    options = parser.parse_args()
    results = {}
    for shape in (WIDE, NARROW):
        if lengths := [x for x in shape[3] if x in (options.lengths or shape[3])]:
            results[f"dim {shape[0]}"] = compare(shape, lengths)
    print(json.dumps({"benchmark": "peers", "threads": torch.get_num_threads(), "results": results}))


if __name__ == "__main__":
    main()
