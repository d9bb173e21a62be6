"""Training against peers at equal dims and parameters, in one process: `python -m benchmarks.peers`.

ours: forward and backward of one window, each memory rule. segment loop: the same model (paper-linear), one segment
after the other through the whole network, gradients through all of the window: what other implementations do.
infini-transformer-pytorch 0.2.1: its own wrapper with its defaults (a backward every two segments). llama:
transformers' Llama with SDPA over the full context. Float32, one row, vocabulary 4,096.

Jobs take turns and medians are shown, but of 32,768 tokens there is one step each. Peak memory is what a process of
its own grows by. "FLOPs" is what full attention computes over what segments of ours do (model/flops.py): what could
be gained by arithmetic alone. Only on a quiet machine.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
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

# hidden size, heads, segment, lengths: rounds (0: a step of the process that memory is measured in)
WIDE = 256, 4, 256, {2048: 5, 8192: 3, 32768: 0}
NARROW = 64, 1, 64, {2048: 5, 8192: 4}  # where the number of calls rules, as launches do on a GPU
VOCABULARY, LAYERS = 4096, 4
LOOP, PEER, LLAMA = "segment loop", "infini-transformer-pytorch", "llama, full attention"
ARMS = (*RULES, LOOP, PEER, LLAMA)


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
    rule = "paper-linear" if arm == LOOP else arm
    model = InfiniForCausalLM(InfiniConfig(**sizes(dim, heads), segment_length=segment, memory=rule)).train()

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


def alone(arm: str, length: int) -> dict[str, float]:
    """MiB by which a step grows its process, after one of two segments so that libraries are loaded; and seconds, if
    no other measures them: of a second step, or of the first where its page faults are under one in a hundred."""
    dim, heads, segment, rounds = WIDE
    keep_freed_blocks()
    step, _ = trainer(arm, dim, heads, segment)
    step(torch.randint(VOCABULARY, (1, 2 * segment)))
    ids = torch.randint(VOCABULARY, (1, length))
    begin = time.perf_counter()
    found: dict[str, float] = {"MiB": round(growth_mib(lambda: step(ids)))}
    if not rounds[length]:
        first = time.perf_counter() - begin
        found["seconds"] = first if first > 60 else timed(lambda: step(ids))
    return found


def all_alone(lengths: list[int]) -> dict[int, dict[str, dict[str, float]]]:
    """`alone` in a process each, forked so that it need not import all again: before this one has other threads."""
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        return {length: {arm: pool.apply(alone, (arm, length)) for arm in ARMS} for length in lengths}


def flops(dim: int, heads: int, segment: int) -> float:
    return flops_per_token(InfiniConfig(**sizes(dim, heads), segment_length=segment, memory="paper-linear"))


def compare(shape: tuple[int, int, int, dict[int, int]], lengths: list[int]) -> dict[str, dict]:
    dim, heads, segment, rounds = shape
    details = all_alone(lengths) if shape is WIDE else {}
    keep_freed_blocks()  # as in training; it serves all of them
    built = {arm: trainer(arm, dim, heads, segment) for arm in ARMS}
    results: dict[str, dict] = {}
    table = Table("tokens", *(f"{arm}\n{built[arm][1] / 1e6:.2f} M" for arm in ARMS), "FLOPs")
    table.title = f"training, tokens/s (peak memory, MiB; torch calls a step); dim {dim}, segments of {segment}"
    for length in lengths:
        ids = torch.randint(VOCABULARY, (1, length))
        if length not in details:
            details[length] = {arm: {"calls": calls(step, ids)} for arm, (step, _) in built.items()}
        if rounds[length]:
            found = interleaved({arm: partial(step, ids) for arm, (step, _) in built.items()}, rounds[length])
        else:
            found = {arm: [details[length][arm]["seconds"]] for arm in ARMS}
        rates = {arm: length / statistics.median(seconds) for arm, seconds in found.items()}
        cells = (f"{rates[arm]:,.0f} ({next(iter(details[length][arm].values())):,})" for arm in ARMS)
        arithmetic = flops(dim, heads, length) / flops(dim, heads, segment)
        table.add_row(f"{length:,}", *cells, f"{arithmetic:.2f}")
        over = {arm: round(ratio(seconds, found["paper-linear"]), 3) for arm, seconds in found.items()}
        results[str(length)] = {"tokens/s": rates, "paper-linear over": over, "details": details[length]}
        results[str(length)]["FLOPs of full attention over"] = round(arithmetic, 3)
    Console(width=150).print(table)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="*", type=int, help="only these numbers of tokens")
    options = parser.parse_args()
    results = {}
    for shape in (WIDE, NARROW):  # in this order: the first forks
        if lengths := [x for x in shape[3] if x in (options.lengths or shape[3])]:
            results[f"dim {shape[0]}"] = compare(shape, lengths)
    print(json.dumps({"benchmark": "peers", "threads": torch.get_num_threads(), "results": results}))


if __name__ == "__main__":
    main()
