"""Peak memory of a step through one long window in chunks, in a process of its own.

`python -m tests.helpers.long_window TOKENS`: MiB that the step adds to what the process held before.
"""

import sys

import torch

from benchmarks.timing import growth_mib
from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.training.allocator import configure_malloc
from infini_train.training.chunks import window_losses

SEGMENT, CHUNK, LONGEST = 256, 32, 1_048_576  # tokens, segments, tokens


def small_model(rule: str, dtype: torch.dtype) -> InfiniForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "segment_length": SEGMENT, "initializer_range": 0.2}
    return InfiniForCausalLM(InfiniConfig(**sizes, **heads, memory=rule)).to(dtype).train()


def main() -> None:
    torch.set_num_threads(1)
    configure_malloc(chunked=True)  # as in training
    tokens, model = int(sys.argv[1]), small_model("selective-delta", torch.float32)
    ids = torch.randint(256, (1, LONGEST))
    labels = ids.roll(-1, 1)

    def step(count: int) -> None:
        window_losses(model, ids[:, :count], labels[:, :count], segments_per_chunk=CHUNK).total.backward()

    step(SEGMENT)  # what libraries set up
    print(growth_mib(lambda: step(tokens)))
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


if __name__ == "__main__":
    main()
