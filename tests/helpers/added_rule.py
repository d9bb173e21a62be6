"""What test_added_rule.py runs in processes of their own, with a copy of the package to which a rule was added."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from infini_train.hf.export import write_model
from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.model.context import ContextGroup
from infini_train.model.flops import exchanged_elements, flops_per_token, parameters
from infini_train.model.window import Window

S, D, VOCABULARY = 8, 16, 31


def model() -> InfiniForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": D, "initializer_range": 0.2}
    made = InfiniForCausalLM(InfiniConfig(**sizes, **heads, segment_length=S, memory="gated-delta")).double()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "strength" in name or "decay" in name:
                p.normal_()
    return made


def unit(x: Tensor) -> Tensor:
    return F.silu(x) / (F.silu(x).square().sum(-1, keepdim=True) + 1e-6).sqrt()


def equals_a_loop(_: Path) -> None:
    """The rule's parallel form is the recurrence of the paper, token after token."""
    n, rule = 5, model().model.layers[0].self_attn.rule
    q, k, v = (torch.randn(n, S, D, dtype=torch.float64) for _ in range(3))
    strength, decay = torch.randn(2, n * S, dtype=torch.float64)
    state = {"M": torch.zeros(1, 1, D, D, dtype=torch.float64)}
    features = {"strength": strength.view(1, -1, 1), "decay": decay.view(1, -1, 1)}
    window = Window(n, (q, q), (q, q))
    out = rule.read_and_write(state, q[None, :, None, None], k[None, :, None], v[None, :, None], features, window)
    m, reads = torch.zeros(D, D, dtype=torch.float64), []
    for t, (k_t, v_t) in enumerate(zip(unit(k).flatten(0, 1), v.flatten(0, 1), strict=True)):
        if t % S == 0:
            reads.append(F.rms_norm(unit(q[t // S]) @ m, (D,), rule.read_norm, 1e-6))
        a, b = 1 / (1 + decay[t].exp()), strength[t].sigmoid()
        m = a * (m - b * torch.outer(k_t, k_t @ m)) + b * torch.outer(k_t, v_t)
    torch.testing.assert_close(out.read[0, :, 0, 0], torch.stack(reads), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out.state["M"][0, 0], m, rtol=1e-10, atol=1e-10)


def generates(_: Path) -> None:
    """Tokens from the cache are those of a whole pass, over several segments and with padding."""
    decoder = model().eval()
    prompt = torch.randint(1, VOCABULARY, (2, 2 * S + 3))
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    out = decoder.generate(
        prompt, attention_mask=mask, max_new_tokens=2 * S, min_new_tokens=2 * S, do_sample=False, pad_token_id=0
    )
    for row, padding in ((0, 4), (1, 0)):
        ids = out[row : row + 1, padding:]
        choice = decoder(ids).logits.argmax(-1)
        first = prompt.shape[1] - padding
        assert choice[0, first - 1 : -1].tolist() == ids[0, first:].tolist()


def counts(_: Path) -> None:
    decoder = model()
    assert parameters(decoder.config) == sum(p.numel() for p in decoder.parameters())
    assert flops_per_token(decoder.config) > 0 and exchanged_elements(decoder.config) == D * D


def exports(out: Path) -> None:
    decoder = model().float().eval()
    write_model(decoder.config, decoder.state_dict(), out / "export", source=out, add_files=lambda directory: None)
    ids = torch.arange(5 * S)[None] % VOCABULARY
    torch.save(decoder(ids).logits, out / "logits.pt")


def shares_windows(out: Path) -> None:
    """Two ranks with half of a window's segments each have the losses, memories and gradients of one process."""
    mp.spawn(_rank, (out,), nprocs=2)
    whole = _outcome()
    parts = [torch.load(out / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(torch.cat([part["losses"] for part in parts], dim=1), whole["losses"])
    torch.testing.assert_close(parts[0]["memory"], whole["memory"])
    for part in parts:
        torch.testing.assert_close(part["gradients"], whole["gradients"])


def _rank(rank: int, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out / 'meeting'}", rank=rank, world_size=2)
    found = _outcome(ContextGroup(dist.group.WORLD), rank, 2)
    for gradient in found["gradients"].values():
        dist.all_reduce(gradient)
    torch.save(found, out / f"{rank}.pt")
    dist.destroy_process_group()


def _outcome(context: ContextGroup | None = None, part: int = 0, parts: int = 1) -> dict:
    decoder = model().train()
    ids = torch.arange(2 * 8 * S).view(2, -1).remainder(VOCABULARY)
    starts = torch.zeros(ids.shape, dtype=torch.bool)
    starts[0, 2 * S + 3] = starts[1, 5 * S] = True
    own, own_starts = ids.chunk(parts, 1)[part], starts.chunk(parts, 1)[part]
    out = decoder.model(own, starts=own_starts if own_starts.any() else None, context=context)
    total, losses = decoder.lm_head(out.last_hidden_state, own)
    total.backward()
    gradients = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    memory = [{name: x.detach() for name, x in layer.items()} for layer in out.memory]
    return {"losses": losses, "memory": memory, "gradients": gradients}


if __name__ == "__main__":
    jobs = {job.__name__: job for job in (equals_a_loop, generates, counts, exports, shares_windows)}
    for name in sys.argv[2:]:
        jobs[name](Path(sys.argv[1]))
