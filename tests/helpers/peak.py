"""Peak memory of training steps, in a process of its own: python -m tests.helpers.peak RULE RECOMPUTE CHUNK, bytes.

RECOMPUTE is 1 if layers are recomputed, and CHUNK the number of segments in a chunk, 0 for the whole window.
"""

import sys

import torch

from benchmarks.timing import growth_mib
from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.training.chunks import window_losses

ROWS, WINDOW, SEGMENT = 2, 4096, 256


def config_of(rule: str, layers: int = 5) -> InfiniConfig:
    sizes = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": layers, "segment_length": SEGMENT}
    return InfiniConfig(**sizes, memory=rule)


def steps(config: InfiniConfig, recompute: bool, chunk: int | None, rows: int, window: int) -> None:
    """As Lightning does them: gradients live until the next forward pass has ended; lanes keep their memories."""
    model = InfiniForCausalLM(config).train()
    if recompute:
        model.activation_checkpointing_enable()
    optimizer, memory = torch.optim.AdamW(model.parameters(), fused=True), None
    for _ in range(2):  # in the second the gradients of the first are still there, and the optimizer has its state
        ids = torch.randint(config.vocab_size, (rows, window))
        out = window_losses(model, ids, ids, memory=memory, segments_per_chunk=chunk)
        memory = [{name: x.detach() for name, x in layer.items()} for layer in out.memory]
        loss = out.total
        del out
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    rule, recompute, chunk = sys.argv[1], sys.argv[2] == "1", int(sys.argv[3]) or None
    steps(config_of(rule, layers=2), recompute, chunk, 1, SEGMENT)  # what libraries set up
    print(2**20 * growth_mib(lambda: steps(config_of(rule), recompute, chunk, ROWS, WINDOW)))
