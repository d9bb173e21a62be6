"""Tiny models, rows of documents for them, and random inputs."""

import torch

from infini_train.model import InfiniConfig, InfiniForCausalLM

S, VOCAB = 6, 29
RULES = ("paper-linear", "paper-delta", "selective-delta")
# Sliding windows: shorter than a segment, a segment, between, and the whole segment before.
SLIDING = (4, S, 9, 2 * S)
OUTPUT = " + output"  # after the name of a rule: with an output memory
NO_BASE = " without B"  # after selective-delta: an empty memory is not read
MODELS = [
    *((rule, None) for rule in RULES),
    ("paper-delta", 9),
    *(("selective-delta", n) for n in SLIDING),
    ("selective-delta" + NO_BASE, 9),
    ("paper-linear" + OUTPUT, None),
    ("selective-delta" + OUTPUT, 9),
]
# Rows of 24 tokens: one document; starts on and off segment boundaries; several in a segment; length-1 documents.
STARTS = {
    "one document": [[0], [0], [0]],
    "aligned": [[0, 12], [0, 6, 18], [0]],
    "anywhere": [[0, 9], [0, 5, 13, 14, 23], [0, 1, 2, 3, 17]],
}


def build(memory: str, dtype=torch.float64, heads=4, kv_heads=2, **options) -> InfiniForCausalLM:
    torch.manual_seed(0)
    memory, plus, _ = memory.partition(OUTPUT)
    memory, no_base, _ = memory.partition(NO_BASE)
    config = InfiniConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=4,
        segment_length=S,
        memory=memory,
        initializer_range=0.5,
        output_memory_dim=3 if plus else None,
        memory_base=not no_base,
        **options,
    )
    model = InfiniForCausalLM(config).to(dtype)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.gate, std=2.0)
        if memory == "selective-delta":  # nothing at its initial value of 0 or 1
            for parameter in layer.self_attn.rule.parameters():
                torch.nn.init.normal_(parameter, std=0.7)
    if model.lm_head.memory is not None:
        torch.nn.init.normal_(model.lm_head.memory.scale, mean=2.0)
    return model


def rows(case: str, length: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    starts = torch.zeros(len(STARTS[case]), length, dtype=torch.bool)
    for row, at in enumerate(STARTS[case]):
        starts[row, at] = True
    return torch.randint(VOCAB, starts.shape), starts


def run_windows(model, ids, starts, window):
    """Logits over consecutive windows, the memory detached between them as training does."""
    memory, logits = model.init_memory(len(ids)), []
    for t in range(0, ids.shape[1], window):
        part = slice(t, t + window)
        out = model(ids[:, part], starts=starts[:, part], memory=memory)
        logits.append(out.logits)
        memory = [{name: x.detach() for name, x in layer.items()} for layer in out.memory]
    return torch.cat(logits, dim=1)


def inputs(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
