"""Training steps of the shipped shapes on one GPU, without and with compiled layers: `python -m benchmarks.gpu`.

Forward and backward of one window of 32,768 tokens, segments of 2,048, under autocast to bfloat16, with a few layers
of each shape, for local attention alone and for the memory rules. "Activations" are what a step allocates above the
weights. MFU is the model FLOPs (model/flops.py) over the device's stated peak. Without a GPU it runs on the CPU, for
a trial with --segment 16.
"""

import statistics
from functools import partial

import torch
from rich.table import Table

from benchmarks import results
from benchmarks.baselines import convert
from benchmarks.timing import interleaved, ratio, timed
from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.model.flops import flops_per_token
from infini_train.model.rules import RULES
from infini_train.training.callbacks.throughput import peak_flops
from infini_train.training.module import compile_layers

# As in configs/*.yaml: hidden size, intermediate size, query heads, key/value heads; then the layers measured.
SHAPES = {
    "160m": (768, 2048, 12, 4, 4),
    "1b": (2048, 5632, 32, 4, 2),
    "8b": (4096, 14336, 32, 8, 1),
}
VOCABULARY, SEGMENTS, ROUNDS = 32000, 16, 4
ARMS = ("local", *RULES)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(shape: str, arm: str, segment: int, compiled: bool) -> InfiniForCausalLM:
    torch.manual_seed(0)
    hidden, intermediate, heads, kv_heads, layers = SHAPES[shape]
    config = InfiniConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        segment_length=segment,
        memory="paper-linear" if arm == "local" else arm,
    )
    with DEVICE:
        model = InfiniForCausalLM(config).train()
    if arm == "local":
        convert(model, "local")
    if compiled:
        compile_layers(model)
    return model


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def step(model: InfiniForCausalLM, ids: torch.Tensor, starts: torch.Tensor) -> None:
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
        total = model.token_losses(ids, ids, starts).total
    total.backward()
    model.zero_grad()
    wait()


def activations(job: partial) -> float:
    """GiB that a step allocates above what was allocated before; 0 on a CPU."""
    if DEVICE.type == "cpu":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS, help="local is always measured")
    parser.add_argument("--documents", type=int, default=0, help="documents that begin inside the window")
    parser.add_argument("--segment", type=int, default=2048)
    options = parser.parse_args()
    length, peak = SEGMENTS * options.segment, peak_flops(DEVICE)
    starts = torch.zeros(1, length, dtype=torch.bool)
    starts[0, torch.randperm(length)[: options.documents]] = True
    ids = torch.randint(VOCABULARY, (1, length), device=DEVICE)
    table = Table("layers of", "", "arm", "tokens/s", "over local", "MFU", "activations, GiB", "first step, s")
    rows = []
    for shape in options.shapes:
        for compiled in (False, True):
            torch._dynamo.reset()
            arms = ["local", *(arm for arm in options.arms if arm != "local")]
            models = {arm: build(shape, arm, options.segment, compiled) for arm in arms}
            jobs = {arm: partial(step, model, ids, starts) for arm, model in models.items()}
            first = {arm: timed(job) for arm, job in jobs.items()}
            seconds = interleaved(jobs, ROUNDS)
            for arm, model in models.items():
                rate = length / statistics.median(seconds[arm])
                found = {
                    "shape": f"{shape} x {SHAPES[shape][-1]}",
                    "how": "compiled" if compiled else "as it is",
                    "arm": arm,
                    "tokens/s": round(rate),
                    "over local": round(ratio(seconds[arm], seconds["local"]), 3),
                    "mfu": round(rate * flops_per_token(model.config) / peak, 3) if peak else None,
                    "activations GiB": round(activations(jobs[arm]), 2),
                    "first step s": round(first[arm], 1),
                }
                rows.append(found)
                table.add_row(*map(str, found.values()))
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    figures = {"benchmark": "gpu", "device": name, "torch": torch.__version__, "results": rows}
    results.report("gpu", {"": table}, figures, {}, options.results, width=120)


if __name__ == "__main__":
    main()
