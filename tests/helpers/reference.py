"""Infini-attention written as the paper writes it: one row, one document, one segment, one head, one token at a time.

Knows nothing of windows, batches, masks or packing: a row is a list of documents, each with its own empty memory,
cut at the row's segment boundaries. Only the parameters are shared with the model under test.
"""

import itertools
import math

import torch
from torch import Tensor

from infini_train.model.output_memory import CLIP, DECAY, RATE


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """RoPE of one head vector [d]: the pair (x_i, x_{i + d/2}) turned by position * theta^(-2i/d).

    The angles are float32 as in transformers' Llama, whatever the model's dtype.
    """
    half = x.shape[-1] // 2
    angles = position * (1 / theta ** (torch.arange(half, dtype=torch.float32) / half))
    cos, sin = angles.cos().double(), angles.sin().double()
    a, b = x[:half], x[half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin))


def features(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, torch.exp(x))


def local_output(q, k, v, t: int, start: int, config, detached: set[int]) -> Tensor:
    """Local attention of token t of a document for one head.

    q, k, v: [t, d] of the document; start: the token at which the segment of t starts, negative if before the
    document. No gradient reaches keys and values across a window's start. Positions count from the first key that a
    segment may see, because angles are rounded to float32.
    """
    theta, first, window, near = config.rope_parameters["rope_theta"], max(start, 0), config.sliding_window, 0
    if window is not None:
        near = min(window, config.segment_length)
        first = max(0, start - near, t - window + 1)
    keys, values = [], []
    for u in range(first, t + 1):
        across = any(u < at <= t for at in detached)
        keys.append(rotate(k[u].detach() if across else k[u], near + u - start, theta))
        values.append(v[u].detach() if across else v[u])
    scores = torch.stack(keys) @ rotate(q[t], near + t - start, theta) / math.sqrt(len(q[t]))
    return torch.softmax(scores, 0) @ torch.stack(values)


def write(rule: str, k: Tensor, v: Tensor, memory):
    """The memory after one segment's keys and values [s, d] of one key/value head."""
    sk = features(k)
    if memory is None:
        return sk.T @ v, sk.sum(0)
    m, z = memory
    if rule == "paper-delta":
        v = v - (sk @ m) / (sk @ z)[:, None]
    return m + sk.T @ v, z + sk.sum(0)


def unit(x: Tensor) -> Tensor:
    x = x / (1 + torch.exp(-x))
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def convolve(x: Tensor, weight: Tensor, detached: set[int]) -> Tensor:
    """x [t, c] of one document, weight [4, c], the last for the token itself; no gradient across a window's start."""
    rows = []
    for t in range(len(x)):
        total = weight[3] * x[t]
        for j in range(1, min(t, 3) + 1):
            across = any(t - j < first <= t for first in detached)
            total = total + weight[3 - j] * (x[t - j].detach() if across else x[t - j])
        rows.append(total)
    return torch.stack(rows)


def selective_attention(layer, config, x: Tensor, pieces: list[tuple[int, int]], detached: set[int]) -> Tensor:
    """As `attention`, for the rule selective-delta: one token at a time."""
    d, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    rule = layer.rule
    qk = torch.cat([x @ p.weight.T for p in (layer.q_proj, layer.k_proj)], dim=1)

    def heads_of(x):
        q, k = x.split((heads * d, kv_heads * d), dim=1)
        return q.view(len(x), heads, d), k.view(len(x), kv_heads, d)

    q, k = heads_of(convolve(qk, rule.conv, detached))
    v = (x @ layer.v_proj.weight.T).view(len(x), kv_heads, d)
    strength = 1 / (1 + torch.exp(-(x @ rule.strength_weight.T + rule.strength_bias)))
    strength = (1.2 * strength - 0.1).clamp(0, 1)  # [t, kv heads]
    gate = 1 / (1 + torch.exp(-(x @ rule.gate_weight.T + layer.gate)))  # [t, heads]
    memories: list = [None] * kv_heads
    out = []
    for i, (first, offset) in enumerate(pieces):
        last = pieces[i + 1][0] if i + 1 < len(pieces) else len(x)
        if first in detached:
            memories = [m if m is None else m.detach() for m in memories]
        for t in range(first, last):
            of_heads = []
            for h in range(heads):
                c = h // (heads // kv_heads)
                local = local_output(q[:, h], k[:, c], v[:, c], t, first - offset, config, detached)
                known = [m for m in (memories[c], None if rule.base is None else rule.base[c]) if m is not None]
                if any(m.any() for m in known):  # a memory to which nothing was written is not read
                    read = rms_norm(unit(q[t, h]) @ sum(known), rule.read_norm, 1e-6)
                    local = gate[t, h] * read + (1 - gate[t, h]) * local
                of_heads.append(local)
            out.append(torch.cat(of_heads))
        for c in range(kv_heads):
            m = torch.zeros(d, d, dtype=x.dtype) if memories[c] is None else memories[c]
            fading = torch.exp(rule.forget[c]) + 1 / (16 * d)
            m = m * torch.exp(-fading * strength[first:last, c].sum())
            for t in range(first, last):
                key = unit(k[t, c])
                m = m + strength[t, c] * torch.outer(key, v[t, c] - key @ m)
            memories[c] = m
    return torch.stack(out) @ layer.o_proj.weight.T


def attention(layer, config, x: Tensor, pieces: list[tuple[int, int]], detached: set[int]) -> Tensor:
    """x [t, hidden] of one document; pieces: (first token, position of it in its segment) of each segment piece."""
    if config.memory == "selective-delta":
        return selective_attention(layer, config, x, pieces, detached)
    d, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    q = (x @ layer.q_proj.weight.T).view(len(x), heads, d)
    k = (x @ layer.k_proj.weight.T).view(len(x), kv_heads, d)
    v = (x @ layer.v_proj.weight.T).view(len(x), kv_heads, d)
    gates = 1 / (1 + torch.exp(-layer.gate))
    memories = [None] * kv_heads
    out = []
    for i, (first, offset) in enumerate(pieces):
        last = pieces[i + 1][0] if i + 1 < len(pieces) else len(x)
        if first in detached:
            memories = [m and (m[0].detach(), m[1].detach()) for m in memories]
        for t in range(first, last):
            of_heads = []
            for h in range(heads):
                c = h // (heads // kv_heads)
                mixed = local_output(q[:, h], k[:, c], v[:, c], t, first - offset, config, detached)
                if memories[c] is not None:
                    m, z = memories[c]
                    sq = features(q[t, h])
                    mixed = gates[h] * (sq @ m) / (sq @ z) + (1 - gates[h]) * mixed
                of_heads.append(mixed)
            out.append(torch.cat(of_heads))
        memories = [write(config.memory, k[first:last, c], v[first:last, c], memories[c]) for c in range(kv_heads)]
    return torch.stack(out) @ layer.o_proj.weight.T


def document_logits(model, ids: Tensor, offset: int = 0, detached: set[int] = frozenset()) -> Tensor:
    """Logits [t, vocabulary] of one document [t] whose first token stands at `offset` in its segment.

    detached: tokens (of the document) at which a window begins: no gradient through the memory there.
    """
    config, size = model.config, model.config.segment_length
    starts = [0, *range(size - offset, len(ids), size)]
    pieces = [(t, (offset + t) % size) for t in starts if t < len(ids)]
    x = model.model.embed_tokens.weight[ids]
    for layer in model.model.layers:
        h = rms_norm(x, layer.input_layernorm.weight, config.rms_norm_eps)
        x = x + attention(layer.self_attn, config, h, pieces, detached)
        h = rms_norm(x, layer.post_attention_layernorm.weight, config.rms_norm_eps)
        up = h @ layer.mlp.up_proj.weight.T
        g = h @ layer.mlp.gate_proj.weight.T
        x = x + (g / (1 + torch.exp(-g)) * up) @ layer.mlp.down_proj.weight.T
    h = rms_norm(x, model.model.norm.weight, config.rms_norm_eps)
    if model.lm_head.memory is None:
        return h @ model.lm_head.weight.T
    return remembered_logits(model.lm_head, h, ids, offset % config.output_chunk, config.output_chunk)


def remembered_logits(head, h: Tensor, ids: Tensor, offset: int, size: int) -> Tensor:
    """Logits of a document whose first token stands at `offset` in its chunk of the output memory."""
    memory, out, errors = 0.0, [], []
    for t in range(len(h)):
        features = head.memory.key_weight @ h[t] + head.memory.key_bias
        features = features / features.norm()
        logits = head.weight @ h[t]
        if t + offset >= size:
            logits = logits + head.memory.scale * (memory @ features)
        out.append(logits)
        if (t + offset + 1) % size:
            target = torch.zeros_like(logits)
            target[ids[min(t + 1, len(ids) - 1)]] = 1  # the last token is in no chunk that is over
            errors.append(torch.outer(target - logits.softmax(0), features).detach())
        else:
            step = RATE * sum(errors, torch.zeros(len(logits), len(features), dtype=h.dtype))
            step = torch.stack([row * min(1, CLIP / row.norm().clamp_min(1e-30)) for row in step])
            memory, errors = DECAY * memory + step, []
    return torch.stack(out)


def row_logits(model, ids: Tensor, starts: Tensor, window: int | None = None) -> Tensor:
    """Logits [t, vocabulary] of a row of documents; `window`: tokens after which gradients stop."""
    bounds = [*torch.nonzero(starts)[:, 0].tolist(), len(ids)]
    out = []
    for begin, end in itertools.pairwise(bounds):
        detached = {t - begin for t in range(0, len(ids), window) if begin < t < end} if window else set()
        out.append(document_logits(model, ids[begin:end], begin % model.config.segment_length, detached))
    return torch.cat(out)
