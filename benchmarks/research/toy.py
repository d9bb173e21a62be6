"""Toy of the memory alone: 2 layers, dim 64, one head of 64, tasks that only the memory can do (issue 8, DESIGN 3.5).

    nice -n 19 env OMP_NUM_THREADS=1 python research/toy.py --task recall --rule add --steps 1900

Self-contained: knows nothing of infini_train. Segments of S tokens, windows of n segments, lanes whose memory is
carried from window to window while the document lasts (--windows: longest document of training, in windows).
"""

import argparse
import json
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------- tasks


class Pairs:
    """Lanes of `key value key value ...`. With overwrite, half of the keys get a new value in each window."""

    def __init__(self, a, batch, seed, windows):
        self.a, self.b, self.rng, self.windows = a, batch, np.random.default_rng(seed), windows
        self.vocab = a.pairs + a.values
        self.map = np.zeros((batch, a.pairs), int)
        self.left = np.zeros(batch, int)
        self.limit = a.pairs  # most keys of a document, for now
        self.subset = np.zeros((batch, a.pairs), int)
        self.active = np.full(batch, a.pairs)  # keys in use by the document of each lane

    def window(self, score=False):
        a, rng, b = self.a, self.rng, self.b
        starts = self.left == 0
        for i in np.nonzero(starts)[0]:
            self.map[i] = rng.integers(a.values, size=a.pairs)
            # half of the documents one window, others up to `windows` (training); exactly `windows` if fixed
            if a.mixed and not score:
                self.active[i] = round(math.exp(rng.uniform(math.log(4), math.log(a.pairs))))
                if rng.random() < 0.5:
                    self.active[i] = a.pairs
                self.active[i] = min(self.active[i], self.limit)
            self.subset[i] = rng.permutation(a.pairs)
            self.left[i] = self.windows if score else rng.integers(1, self.windows + 1)
        if score and starts.any():
            self.told = np.full((b, a.pairs), -1)  # last value told in an earlier segment
            self.over = np.zeros((b, a.pairs), bool)  # overwritten at least once in an earlier segment
        self.left -= 1
        p = a.segments * a.S // 2
        key = np.take_along_axis(self.subset, rng.integers(self.active[:, None], size=(b, p)), 1)
        when = np.full((b, a.pairs), p + 1)
        if a.task != "recall":
            for i in range(b):
                chosen = rng.permutation(self.subset[i, : self.active[i]])[: self.active[i] // 2]
                when[i, chosen] = rng.integers(p, size=len(chosen))
        new = (self.map + rng.integers(1, a.values, size=self.map.shape)) % a.values  # really another value
        rows = np.arange(b)[:, None]
        changed = np.arange(p)[None] >= when[rows, key]
        value = np.where(changed, new[rows, key], self.map[rows, key])
        x = np.stack((key, value + a.pairs), -1).reshape(b, -1)
        out = [torch.from_numpy(x), torch.from_numpy(starts)]
        if score:
            kinds = np.zeros((b, p), int)  # 1: only the memory knows; 2: that, and overwritten before
            per = a.S // 2
            r = np.arange(b)
            for s in range(a.segments):
                here = np.zeros((b, a.pairs), bool)
                told, over = self.told.copy(), self.over.copy()
                for t in range(s * per, (s + 1) * per):
                    k, v = key[:, t], value[:, t]
                    fresh = ~here[r, k]
                    ok = fresh & (self.told[r, k] == v)
                    kinds[:, t] = np.where(ok, np.where(self.over[r, k], 2, 1), 0)
                    here[r, k] = True
                    old = told[r, k]
                    over[r, k] |= (old >= 0) & (old != v)
                    told[r, k] = v
                self.told, self.over = told, over
            out.append(torch.from_numpy(kinds))
        self.map = np.where(when <= p, new, self.map)
        return out


class Needle:
    """Passkey in noise: filler is a random Markov chain over 64 words (4 successors each); `PK d d d d d` wherever
    the key is mentioned: the first mention tells it, any later one must recall it (and tells it again).

    Training: documents of one window with 2 ... 32 mentions (log-uniform). Scoring: told once at a depth, asked at
    the end. 64: PK, 65: BOS, 66 ... 75: digits.
    """

    def __init__(self, a, batch, seed):
        self.a, self.b, self.rng, self.vocab = a, batch, np.random.default_rng(seed), 76
        self.thick = a.thick
        self.rest = [np.zeros(0, int)] * batch
        self.next = np.random.default_rng(0).integers(64, size=(64, 4))

    def filler(self, b, t):
        x = np.zeros((b, t), int)
        x[:, 0] = self.rng.integers(64, size=b)
        choice = self.rng.integers(4, size=(b, t))
        for i in range(1, t):
            x[:, i] = self.next[x[:, i - 1], choice[:, i]]
        return x

    def mention(self, key):
        return np.concatenate((np.full((len(key), 1), 64), key + 66), 1)

    def document(self, t):
        """[t] tokens: full of mentions (a share `thick` of documents), or gaps between them log-uniform, 1 to t."""
        rng = self.rng
        x = self.filler(1, t)[0]
        x[0] = 65
        key = rng.integers(10, size=5)
        told = [64, *(key + 66)]
        if rng.random() < self.thick:  # one mention every 8 tokens
            for at in np.sort(rng.choice(t // 6 - 2, t // 8, replace=False)) * 6 + 1 + rng.integers(6):
                x[at : at + 6] = told
            return x
        at = 1 + int(math.exp(rng.uniform(0, math.log(t / 2))))
        while at + 6 <= t:
            x[at : at + 6] = told
            at += 6 + int(math.exp(rng.uniform(0, math.log(t))))
        return x

    def window(self):
        """Documents of 512, 1,024 ... 2,048 tokens."""
        t = self.a.S * self.a.segments
        starts = torch.tensor([len(x) == 0 for x in self.rest])
        self.rest = [x if len(x) else self.document(t * int(self.rng.integers(1, 2048 // t + 1))) for x in self.rest]
        ids = np.stack([x[:t] for x in self.rest])
        self.rest = [x[t:] for x in self.rest]
        return torch.from_numpy(ids), starts

    @torch.no_grad()
    def score(self, model, length, samples, depths=11):
        """Exact matches by depth (0: told first) out of `samples` each, at documents of `length` tokens."""
        b, step = depths * samples, self.a.S * 16
        key = self.rng.integers(10, size=(b, 5))
        place = np.repeat(np.linspace(1, length - 13, depths).astype(int), samples)
        states = model.empty(b)
        fill = self.filler(b, min(length, 65536))
        for at in range(0, length, step):
            x = np.take(fill, range(at, at + step), 1, mode="wrap")
            if at == 0:
                x[:, 0] = 65
            told = self.mention(key)
            for i in range(b):
                lo, hi = max(place[i], at), min(place[i] + 6, at + step)
                if lo < hi:
                    x[i, lo - at : hi - at] = told[i, lo - place[i] : hi - place[i]]
            if at + step == length:
                x[:, -6:] = told
            logits, states = model(torch.from_numpy(x), states)
        right = (logits[:, -6:-1].argmax(-1).numpy() == told[:, 1:]).all(1)
        return right.reshape(depths, samples).mean(1).round(2).tolist()


class Mix:
    """Half of the lanes needles, half dense pairs (whose tokens come after the needle's 76)."""

    def __init__(self, a, batch, seed):
        self.pairs, self.needle = Pairs(a, batch // 2, seed, a.windows), Needle(a, batch - batch // 2, seed)
        self.vocab = self.pairs.vocab + 76

    def window(self):
        a, b = self.pairs.window(), self.needle.window()
        return torch.cat((a[0] + 76, b[0])), torch.cat((a[1], b[1]))


# ---------------------------------------------------------------- rules: state M [b, h, d, e], float32


def unit(x):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


class Memory(nn.Module):
    """k, q, v: [b, n, h, s, d]; x: [b, n, s, D]. Returns the memories before each segment and after the last."""

    def __init__(self, a):
        super().__init__()
        self.a = a
        self.strength = nn.Linear(a.dim, a.heads)
        nn.init.zeros_(self.strength.weight)
        nn.init.constant_(self.strength.bias, a.beta_bias)
        if a.decay == 2:
            self.forget = nn.Parameter(torch.full((a.heads,), a.forget))
        if a.decay == 1:
            self.forget = nn.Linear(a.dim, a.heads)
            nn.init.zeros_(self.forget.weight)
            nn.init.constant_(self.forget.bias, -6.0)

    def forward(self, m, x, k, v):
        a = self.a
        w = self.strength(x).transpose(-1, -2)  # [b, n, h, s]
        if a.beta == "sigmoid":
            w = torch.sigmoid(w)
        elif a.beta == "stretch":  # exactly 0 and 1 within reach
            w = (torch.sigmoid(w) * 1.2 - 0.1).clamp(0, 1)
        elif a.beta == "softplus":
            w = F.softplus(w)
        elif a.beta == "exp":
            w = torch.exp(w.clamp(-15, 6))
        self.last_w = w
        kt = k.transpose(-1, -2)
        eye = torch.eye(k.shape[-1])
        decay = None
        if a.decay == 2:  # forget as much as is written: no writes, no decay
            decay = torch.exp(-self.forget.exp() * w.sum(-1))[..., None, None]
        if a.decay == 1:
            decay = torch.exp(-F.softplus(self.forget(x)).mean(2))[..., None, None]  # [b, n, h, 1, 1]
        if a.rule == "add":
            add, keep = kt @ (w[..., None] * v), None
        elif a.rule == "delta":  # token after token within the segment, as one triangular system
            wk = w[..., None] * k
            lower = (wk @ kt).tril(-1) + torch.eye(k.shape[-2])
            both = torch.linalg.solve_triangular(
                lower, torch.cat((wk, w[..., None] * v), -1), upper=False, unitriangular=True
            )
            wk, wv = both.split((k.shape[-1], v.shape[-1]), -1)
            keep, add = eye - kt @ wk, kt @ wv
        elif a.rule == "implicit":
            wk = w[..., None] * k
            both = torch.linalg.solve(
                eye + kt @ wk, torch.cat((eye.expand(*k.shape[:3], -1, -1), kt @ (w[..., None] * v)), -1)
            )
            keep, add = both.split((k.shape[-1], v.shape[-1]), -1)
        out = [m]
        # unbind: the backward of an index would fill a whole tensor with zeros for each segment
        add = add.unbind(1)
        keep = keep.unbind(1) if keep is not None else None
        decay = decay.unbind(1) if decay is not None else None
        for s in range(k.shape[1]):
            old = out[-1]
            if keep is not None:
                old = keep[s] @ old
            if decay is not None:
                old = old * decay[s]
            out.append(old + add[s])
        return torch.stack(out, 1)


class Attention(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.a = a
        hd = a.heads * a.head_dim
        self.q, self.k, self.v = (nn.Linear(a.dim, hd, bias=False) for _ in range(3))
        self.o = nn.Linear(hd, a.dim, bias=False)
        self.conv = nn.Parameter(torch.zeros(3 * hd, 1, 4))
        with torch.no_grad():
            self.conv.uniform_(-0.5, 0.5)
            if a.conv_init == "previous":  # keys of the token before, as pairs want them
                self.conv.mul_(0.1)
                self.conv[:, :, -1] += 0.5
                self.conv[hd : 2 * hd, :, -2] += 0.5
            if a.conv_init == "identity":
                self.conv.mul_(0.1)
                self.conv[:, :, -1] += 1
        self.memory = Memory(a)
        self.gate = nn.Linear(a.dim, a.heads)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.norm = nn.Parameter(torch.ones(a.heads, 1, a.head_dim))

    def split(self, x):
        a = self.a
        b, t = x.shape[:2]
        return x.view(b, t // a.S, a.S, a.heads, a.head_dim).transpose(2, 3)

    def forward(self, x, state):
        a = self.a
        qkv = torch.cat((self.q(x), self.k(x), self.v(x)), -1)
        q0, k0, v0 = (self.split(t) for t in qkv.chunk(3, -1))
        before = state["conv"]
        padded = torch.cat((before, qkv), 1)
        c = self.conv[:, 0].T
        t = qkv.shape[1]
        conv = sum(padded[:, i : i + t] * c[i] for i in range(4))
        q, k, v = (self.split(t) for t in conv.chunk(3, -1))
        if a.local_conv == 2:
            q0, k0, v0 = q, k, v
        if a.v_act:
            v = F.silu(v)
        if a.keys == "silu":
            q, k = unit(F.silu(q)), unit(F.silu(k))
        elif a.keys == "signed":
            q, k = unit(q), unit(k)
        if a.local_conv == 1:
            q0, k0, v0 = q, k * math.sqrt(a.head_dim), v
        rope = rotate(a.S, a.head_dim)
        local = F.scaled_dot_product_attention(turn(q0, *rope), turn(k0, *rope), v0, is_causal=True)
        xs = x.view(x.shape[0], -1, a.S, x.shape[-1])
        m = self.memory(state["M"], xs, k, v)
        read = q @ m[:, :-1]
        # no division by the norm of an empty read
        read = read * torch.rsqrt(read.square().mean(-1, keepdim=True) + 1e-6) * self.norm
        g = torch.sigmoid(self.gate(xs)).transpose(-1, -2)[..., None]
        if a.mix == "lerp":
            known = (m[:, :-1].detach().abs().sum((-1, -2), keepdim=True) > 0).float()
            out = torch.lerp(local, read, g * known)
        else:
            out = local + g * read
        out = out.transpose(2, 3).reshape(x.shape[0], x.shape[1], -1)
        return self.o(out), {"M": m[:, -1], "conv": padded[:, -3:]}


def rotate(s, d):
    f = 10000.0 ** (-torch.arange(0, d, 2) / d)
    angle = torch.arange(s)[:, None] * f
    return angle.cos(), angle.sin()


def turn(x, cos, sin):
    u, w = x.chunk(2, -1)
    return torch.cat((u * cos - w * sin, u * sin + w * cos), -1)


class Block(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.n1, self.n2 = nn.RMSNorm(a.dim, eps=1e-6), nn.RMSNorm(a.dim, eps=1e-6)
        self.attn = Attention(a)
        self.up, self.down = nn.Linear(a.dim, 4 * a.dim, bias=False), nn.Linear(2 * a.dim, a.dim, bias=False)

    def forward(self, x, state):
        y, state = self.attn(self.n1(x), state)
        x = x + y
        u, g = self.up(self.n2(x)).chunk(2, -1)
        return x + self.down(F.silu(g) * u), state


class Model(nn.Module):
    def __init__(self, a, vocab):
        super().__init__()
        self.a = a
        self.embed = nn.Embedding(vocab, a.dim)
        self.blocks = nn.ModuleList(Block(a) for _ in range(a.layers))
        self.norm = nn.RMSNorm(a.dim, eps=1e-6)
        self.head = nn.Linear(a.dim, vocab, bias=False)
        for p in self.modules():
            if isinstance(p, nn.Linear) and p.bias is None:
                nn.init.normal_(p.weight, std=a.init)
        nn.init.normal_(self.embed.weight, std=a.embed_init)

    def empty(self, b):
        a = self.a
        return [
            {
                "M": torch.zeros(b, a.heads, a.head_dim, a.head_dim),
                "conv": torch.zeros(b, 3, 3 * a.heads * a.head_dim),
            }
            for _ in range(a.layers)
        ]

    def forward(self, ids, states):
        x = self.embed(ids)
        out = []
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block(x, state)
            out.append(state)
        return self.head(self.norm(x)), out


def reset(states, starts):
    keep = (~starts).float()
    return [{k: t.detach() * keep.view(-1, *[1] * (t.dim() - 1)) for k, t in s.items()} for s in states]


@torch.no_grad()
def evaluate(a, model, windows, batch=8, seed=10_000):
    """Accuracy on what only the memory knows, {segments: (all, overwritten)} at 1, 8, 64 ... windows."""
    task = Pairs(a, batch, seed, windows)
    states = model.empty(batch)
    result, at = {}, {1, 2, 4, 8, 16, 32, 64}
    for w in range(1, windows + 1):
        ids, starts, kinds = task.window(score=True)
        states = reset(states, starts)
        logits, states = model(ids, states)
        if w in at or w - 1 in at or w == windows:
            guess = logits[:, :-1:2].argmax(-1)
            right = guess == ids[:, 1::2]
            row = []
            for kind in (1, 2):
                sel = kinds == kind
                row.append(round(right[sel].float().mean().item(), 4) if sel.any() else None)
            if w in at:
                result[w * a.segments] = row
    return result


def groups(a, model):
    gates, decay, none = [], [], []
    for name, p in model.named_parameters():
        if "gate" in name or "strength" in name or "forget" in name:
            gates.append(p)
        elif p.dim() >= 2 and "conv" not in name and "norm" not in name:
            decay.append(p)
        else:
            none.append(p)
    return [
        {"params": decay, "lr": a.lr, "weight_decay": a.wd},
        {"params": none, "lr": a.lr, "weight_decay": 0.0},
        {"params": gates, "lr": a.gate_lr, "weight_decay": 0.0},
    ]


def arguments():
    p = argparse.ArgumentParser()
    add = p.add_argument
    add("--task", default="recall")
    add("--rule", default="delta")
    add("--beta", default="sigmoid")
    add("--beta-bias", type=float, default=-2.0)
    add("--decay", type=int, default=0)
    add("--forget", type=float, default=-5.0)
    add("--keys", default="silu")
    add("--mix", default="lerp")
    add("--v-act", type=int, default=0)
    add("--local-conv", type=int, default=0)
    add("--conv-init", default="random")
    add("--pairs", type=int, default=64)
    add("--values", type=int, default=64)
    add("--S", type=int, default=32)
    add("--segments", type=int, default=16)
    add("--mixed", type=int, default=1)
    add("--windows", type=int, default=1)
    add("--batch", type=int, default=8)
    add("--layers", type=int, default=2)
    add("--dim", type=int, default=64)
    add("--heads", type=int, default=1)
    add("--head-dim", type=int, default=64)
    add("--steps", type=int, default=1900)
    add("--lr", type=float, default=5e-3)
    add("--gate-lr", type=float, default=1e-2)
    add("--wd", type=float, default=0.0)
    add("--init", type=float, default=0.125)
    add("--embed-init", type=float, default=1.0)
    add("--schedule", default="cosine")
    add("--all-tokens", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--long", type=int, default=64)
    add("--every", type=int, default=200)
    add("--thick", type=float, default=0.5)  # share of documents full of mentions
    add("--thick-end", type=float, default=0.1)
    add("--ramp", type=float, default=0.0)
    add("--cost", type=float, default=0.0)
    add("--hoyer", type=float, default=0.0)
    add("--samples", type=int, default=10)
    add("--dense", type=int, default=0)
    add("--memory", default="selective-delta")  # research/framework.py
    add("--kv-heads", type=int, default=0)
    add("--load", default="")
    add("--save", default="")
    add("--stop", type=float, default=0.0)
    return p.parse_args()


def main():
    a = arguments()
    torch.set_num_threads(1)
    torch.manual_seed(a.seed)
    needle = a.task == "needle"
    dense = a.dense
    if needle:
        a.pairs = a.values = dense or a.pairs
    task = (
        Mix(a, a.batch, a.seed)
        if dense
        else Needle(a, a.batch, a.seed)
        if needle
        else Pairs(a, a.batch, a.seed, a.windows)
    )
    model = Model(a, task.vocab)
    if a.load:
        model.load_state_dict(torch.load(a.load, weights_only=True)["model"])
    opt = torch.optim.AdamW(groups(a, model), betas=(0.9, 0.95))
    base = [g["lr"] for g in opt.param_groups]
    states = model.empty(a.batch)
    t0, total, dense_total = time.time(), 0.0, 0.0
    for step in range(1, a.steps + 1):
        f = min(1, step / 50)
        if a.schedule == "cosine":
            f *= 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / a.steps))
        else:  # WSD: the last fifth down
            f *= min(1, (a.steps - step) / (0.2 * a.steps) + 0.02)
        for g, lr in zip(opt.param_groups, base, strict=True):
            g["lr"] = lr * f
        if needle:  # thick documents first, few of them last
            (task.needle if dense else task).thick = a.thick + (a.thick_end - a.thick) * min(1, 1.5 * step / a.steps)
        if a.ramp and (not needle or dense):  # from 8 keys to all over the first part of the steps
            share = min(1, step / (a.ramp * a.steps))
            (task.pairs if dense else task).limit = round(8 * (a.pairs / 8) ** share)
        ids, starts = task.window()
        states = reset(states, starts)
        logits, states = model(ids, states)
        loss_all = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(
            a.batch, -1
        )
        loss = loss_all.mean() if a.all_tokens else loss_all[:, ::2].mean()
        if a.cost:  # of writing, in nats a token of strength 1
            loss = loss + a.cost * sum(b.attn.memory.last_w.mean() for b in model.blocks)
        if a.hoyer:  # sparsity whatever the scale: mean over root mean square, 1 if all tokens are written alike
            for b in model.blocks:
                w = b.attn.memory.last_w.transpose(1, 2).flatten(2)  # [b, h, T]
                loss = loss + a.hoyer * (w.mean(-1) * torch.rsqrt(w.square().mean(-1) + 1e-6)).mean()
        opt.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if needle:
            digits = loss_all[(ids[:, 1:] >= 66) & (ids[:, 1:] < 76)]
            total += digits.sum().item() / max(1, digits.numel())
            dense_total += loss_all[ids[:, 1:] >= 76 + a.values].mean().item() if dense else 0.0
            if step % a.every == 0 or step == a.steps:
                acc = {t: np.mean(Needle(a, 1, 1).score(model, t, 2)).round(3) for t in (2048,)}
                w = [
                    [round(b.attn.memory.last_w[0].quantile(q).item(), 4) for q in (0.1, 0.5, 0.9, 0.99)]
                    for b in model.blocks
                ]
                print(
                    f"{step:5d} {time.time() - t0:5.0f}s digit loss {total / a.every:.3f} "
                    f"pair loss {dense_total / a.every:.3f} |g| {norm:.2f} w {w} {acc}",
                    flush=True,
                )
                total = dense_total = 0.0
            continue
        total += loss_all[:, ::2].mean().item()
        if step % a.every == 0 or step == a.steps:
            quick = evaluate(a, model, 8 if step < a.steps else a.long, batch=8)
            w = [
                f"{b.attn.memory.last_w.mean():.2f}/{b.attn.memory.last_w[..., 1::2].mean():.2f}"
                for b in model.blocks
            ]
            print(
                f"{step:5d} {time.time() - t0:5.0f}s value loss {total / a.every:.3f} |g| {norm:.2f} w {w} {quick}",
                flush=True,
            )
            total = 0.0
            first = quick[a.segments][1 if a.task == "overwrite" else 0]
            if a.stop and first and first > a.stop:
                break
    if a.save:
        torch.save({"args": vars(a), "model": model.state_dict()}, a.save)
    if needle:
        final = {t: Needle(a, 1, 2).score(model, t, a.samples) for t in (2048, a.long * 2048)}
        print(json.dumps({"args": vars(a), "final": final, "s": round(time.time() - t0)}))
        return
    print(
        json.dumps(
            {
                "args": vars(a),
                "final": evaluate(a, model, a.long, batch=16, seed=20_000),
                "s": round(time.time() - t0),
            }
        )
    )


if __name__ == "__main__":
    main()
