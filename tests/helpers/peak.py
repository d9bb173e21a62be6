"""Peak memory of training steps, in a process of its own: python -m tests.helpers.peak RULE RECOMPUTE, bytes."""

import sys

import torch

from benchmarks.timing import growth_mib
from infini_train.model import InfiniConfig, InfiniForCausalLM

ROWS, WINDOW, SEGMENT = 2, 4096, 256


def config_of(rule: str, layers: int = 5) -> InfiniConfig:
    sizes = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": layers, "segment_length": SEGMENT}
    return InfiniConfig(**sizes, memory=rule)


def steps(config: InfiniConfig, recompute: bool, rows: int, window: int) -> None:
    """As Lightning does them: gradients live until the next forward pass has ended; lanes keep their memories."""
    model = InfiniForCausalLM(config).train()
    if recompute:
        model.activation_checkpointing_enable()
    optimizer, memory = torch.optim.AdamW(model.parameters(), fused=True), None
    for _ in range(2):  # in the second the gradients of the first are still there, and the optimizer has its state
        ids = torch.randint(config.vocab_size, (rows, window))
        out = model.token_losses(ids, ids, memory=memory)
        memory = [{name: x.detach() for name, x in layer.items()} for layer in out.memory]
        loss = out.total
        del out
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    rule, recompute = sys.argv[1], sys.argv[2] == "True"
    steps(config_of(rule, layers=2), recompute, 1, SEGMENT)  # what libraries set up
    print(2**20 * growth_mib(lambda: steps(config_of(rule), recompute, ROWS, WINDOW)))
