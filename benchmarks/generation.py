"""Peak memory of reading a prompt, and time per new token after it: `python -m benchmarks.generation`.

Dim 256, 2 layers, 4 heads of 64, vocabulary 4,096, segments of 2,048, one row, float32. Each length runs in a process
of its own; memory is the growth of that process's peak resident set over that after a warm-up. glibc is told to give
large blocks back at once: by default what it keeps for later varies by a factor of 1.5 from run to run.

A second table has the time of a new token over that of a Llama of the same shape with its DynamicCache: calls of one
token in turn, one thread, median of the ratios; and for the smaller shape that of reading the prompt before it,
in pieces of 4,096 tokens, all threads.
"""

import itertools
import json
import statistics
import time
from functools import partial

import torch
from rich.table import Table
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks import results
from benchmarks.timing import child, growth_mib, interleaved, ratio
from infini_train.model import InfiniCache, InfiniConfig, InfiniForCausalLM

LENGTHS, NEW_TOKENS = (16_384, 131_072, 1_048_576), 33
# Shapes by hidden size: size of the MLP, layers, heads, key/value heads.
SHAPES = {128: (352, 12, 4, 4), 576: (1536, 6, 9, 3)}
RULES, CONTEXTS, STEPS = ("paper-linear", "selective-delta"), (1_024, 8_192, 32_768), 80
PREFILLED = 128  # hidden size of the models of which reading the prompt is timed
READS = 32_768  # tokens over which reading a prompt is repeated, in turns


def measure(length: int) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "segment_length": 2048}
    model = InfiniForCausalLM(InfiniConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)).eval()
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(torch.randint(4096, (1, 64)), **options)
    ids = torch.randint(4096, (1, length))
    stamps = []
    model.register_forward_hook(lambda *_: stamps.append(time.perf_counter()))
    begin = time.perf_counter()
    grown = growth_mib(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options))
    steps = [b - a for a, b in itertools.pairwise(stamps[-NEW_TOKENS:])]
    prefill = stamps[-NEW_TOKENS] - begin
    print(json.dumps({"MiB": grown, "prefill_s": prefill, "token_s": statistics.median(steps)}))


def new_cache(model: PreTrainedModel) -> Cache:
    return DynamicCache(config=model.config) if isinstance(model, LlamaForCausalLM) else InfiniCache(model.config)


def read(model: PreTrainedModel, ids: torch.Tensor) -> Cache:
    """The cache after reading a prompt in pieces of 4,096 tokens."""
    cache = new_cache(model)
    for part in ids.split(4096, dim=1):
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.no_grad()
def beside_llama(hidden: int, context: int) -> None:
    """Print the time of a new token over a Llama's and, for the smaller models, that of reading the prompt."""
    torch.manual_seed(0)
    inner, layers, heads, kv_heads = SHAPES[hidden]
    sizes = {"vocab_size": 4096, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 65_536}
    llama = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    models = {
        rule: InfiniForCausalLM(InfiniConfig(**sizes, segment_length=2048, memory=rule)).eval() for rule in RULES
    }
    ids = torch.randint(4096, (1, context))
    found, jobs = {}, {}
    if hidden == PREFILLED:
        reads = {name: partial(read, model, ids) for name, model in {**models, "llama": llama}.items()}
        seconds = interleaved(reads, READS // context)
        found["prompt"] = {rule: ratio(seconds[rule], seconds["llama"]) for rule in RULES}
    for name, model in {**models, "llama": llama}.items():
        if model is llama:  # what the cache holds changes no time, and reading takes minutes
            cache = new_cache(model)
            for layer in range(layers):
                cache.update(*torch.randn(2, 1, kv_heads, context, hidden // heads), layer)
        else:
            cache = read(model, ids)
        jobs[name] = partial(model, ids[:, :1], past_key_values=cache, use_cache=True)
    torch.set_num_threads(1)
    steps = interleaved(jobs, STEPS)
    found["new token"] = {rule: ratio(steps[rule], steps["llama"]) for rule in RULES}
    print(json.dumps(found))


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("length", nargs="?", type=int, help="measure only this prompt, in this process")
    parser.add_argument("--hidden", type=int, choices=SHAPES, help="beside a Llama of this hidden size")
    options = parser.parse_args()
    if options.length is not None:
        beside_llama(options.hidden, options.length) if options.hidden else measure(options.length)
        return
    table = Table("prompt, tokens", "memory, MiB", "over 16,384", "prefill, tokens/s", "new token, ms")
    first, lengths = None, {}
    for length in LENGTHS:
        found = child("generation", length, MALLOC_MMAP_THRESHOLD_="1000000")
        first = first or found["MiB"]
        ratio = found["MiB"] / first
        lengths[length] = {"memory_ratio": round(ratio, 3), **{k: round(v, 4) for k, v in found.items()}}
        rate, token = f"{length / found['prefill_s']:,.0f}", f"{1000 * found['token_s']:.2f}"
        table.add_row(f"{length:,}", f"{found['MiB']:,.1f}", f"{ratio:.3f}", rate, token)
    titles = {"new token": "time of a new token over Llama's", "prompt": "time of a prompt over Llama's"}
    tables = {what: Table("hidden", "context, tokens", *RULES, title=title) for what, title in titles.items()}
    ratios = {}
    for hidden in SHAPES:
        for context in CONTEXTS:
            found = child("generation", context, "--hidden", hidden)
            ratios[f"{hidden}, {context}"] = found
            for what, by_rule in found.items():
                tables[what].add_row(str(hidden), f"{context:,}", *(f"{by_rule[rule]:.2f}" for rule in RULES))
    short, middle = (lengths[length] for length in LENGTHS[:2])
    summary = {
        "memory of a prompt of 131,072 tokens over one of 16,384": f"{middle['memory_ratio']:.2f} x",
        "a new token after 16,384 and after 131,072 tokens": f"{1000 * short['token_s']:.1f} ms, "
        f"{1000 * middle['token_s']:.1f} ms",
    }
    figures = {"lengths": lengths, "time_over_llama": ratios}
    results.report("generation", {"": table, **tables}, figures, summary, options.results)


if __name__ == "__main__":
    main()
