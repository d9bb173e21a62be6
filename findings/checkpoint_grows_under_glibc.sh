#!/usr/bin/env bash
# torch's activation checkpointing on a CPU, with and without use_reentrant: a sequence goes piece after piece through
# checkpointed blocks with a head over a vocabulary. Of each piece only its input (1 MiB) and a small state are kept
# until backward, yet under glibc's malloc the process grows by about ten times that per piece. What is kept lies
# scattered among the large temporary tensors, which then fit no more into what they have freed. Under jemalloc the
# same program grows by little more than what is kept, and is no slower.
# Expected: peak memory of the kept inputs and one piece's activations, whatever the allocator.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
(cd "$work" && apt-get download -o APT::Sandbox::User=root libjemalloc2 >/dev/null && dpkg -x libjemalloc2_*.deb jemalloc)
jemalloc=$(find "$work/jemalloc" -name 'libjemalloc.so.2')
cat > "$work/pieces.py" <<'PY'
import sys

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH, TOKENS, VOCABULARY = 256, 1024, 4096


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.down = nn.RMSNorm(WIDTH), nn.Linear(704, WIDTH)
        self.up, self.gate = nn.Linear(WIDTH, 704), nn.Linear(WIDTH, 704)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))


def piece(x, state, labels):
    hidden = blocks(x + state)
    return nn.functional.cross_entropy(head(hidden), labels), hidden.mean(0)


def run(pieces, reentrant):
    state, total = torch.zeros(WIDTH, requires_grad=True), 0.0
    for _ in range(pieces):
        x, labels = torch.randn(TOKENS, WIDTH), torch.randint(VOCABULARY, (TOKENS,))
        loss, state = checkpoint(piece, x, state, labels, use_reentrant=reentrant)
        total = total + loss
    total.backward()


torch.set_num_threads(1)
blocks, head = nn.Sequential(*(Block() for _ in range(4))), nn.Linear(WIDTH, VOCABULARY)
pieces, reentrant = int(sys.argv[1]), sys.argv[2] == "reentrant"
run(2, reentrant)
before = status("VmRSS")
run(pieces, reentrant)
print(round(status("VmHWM") - before))
PY
grown() { "$work/venv/bin/python" "$work/pieces.py" 96 "$1"; }
glibc=$(grown non-reentrant)
old=$(grown reentrant)
je=$(LD_PRELOAD=$jemalloc MALLOC_CONF=dirty_decay_ms:-1,muzzy_decay_ms:-1 grown non-reentrant)
"$work/venv/bin/python" -c 'import platform, torch; print("torch", torch.__version__, "with", *platform.libc_ver())'
dpkg-deb -f "$work"/libjemalloc2_*.deb Package Version
echo "96 pieces, of each of which 1 MiB is kept. The process grows by $glibc MiB under glibc's malloc"
echo "($old MiB with use_reentrant=True), and by $je MiB under jemalloc."
((glibc > 5 * 96 && old > 5 * 96 && je < 2 * 96)) || { echo "it has changed" >&2; exit 1; }
