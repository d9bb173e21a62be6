"""Peak memory of reading a prompt, and time per new token after it: `python -m benchmarks.generation`.

Dim 256, 2 layers, 4 heads of 64, vocabulary 4,096, segments of 2,048, one row, float32. Each length runs in a process
of its own; memory is the growth of that process's peak resident set over that after a warm-up. glibc is told to give
large blocks back at once: by default what it keeps for later varies by a factor of 1.5 from run to run.
"""

import itertools
import json
import statistics
import time

import torch
from rich.table import Table

from benchmarks import results
from benchmarks.timing import child, growth_mib
from infini_train.model import InfiniConfig, InfiniForCausalLM

LENGTHS, NEW_TOKENS = (16_384, 131_072, 1_048_576), 33


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


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("length", nargs="?", type=int, help="measure only this prompt, in this process")
    options = parser.parse_args()
    if options.length is not None:
        measure(options.length)
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
    short, middle = (lengths[length] for length in LENGTHS[:2])
    summary = {
        "memory of a prompt of 131,072 tokens over one of 16,384": f"{middle['memory_ratio']:.2f} x",
        "a new token after 16,384 and after 131,072 tokens": f"{1000 * short['token_s']:.1f} ms, "
        f"{1000 * middle['token_s']:.1f} ms",
    }
    results.report("generation", {"": table}, lengths, summary, options.results)


if __name__ == "__main__":
    main()
