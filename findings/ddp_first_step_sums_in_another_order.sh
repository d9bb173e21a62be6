#!/usr/bin/env bash
# torch's DistributedDataParallel on four ranks (gloo): three steps, then three more in a new DDP around the same
# weights, as in a run that resumes. After its first step DDP arranges gradients in its buckets in the order in which
# backward made them, and the place in a bucket decides in which order the ranks' shares are added. So the fourth step
# differs in its last bits from that of six steps without a break. On two ranks, where the order does not matter, and
# with find_unused_parameters=True, which leaves the buckets as they are, both are the same.
# Expected: the same bits, because weights, data and number of ranks are the same.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$work/resumed.py" <<'PY'
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def trained(rank, steps, weights, **options):
    """The weights after SGD steps, each on a batch of its own that depends on the step and the rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 33), nn.Tanh(), nn.Linear(33, 7), nn.Linear(7, 50))
    if weights is not None:
        model.load_state_dict(weights)
    ddp, optimizer = DistributedDataParallel(model, **options), torch.optim.SGD(model.parameters(), lr=0.5)
    for step in steps:
        ids = torch.randint(50, (64,), generator=torch.Generator().manual_seed(1000 * step + rank))
        optimizer.zero_grad()
        nn.functional.cross_entropy(ddp(ids), ids.roll(1)).backward()
        optimizer.step()
    return {name: x.clone() for name, x in model.state_dict().items()}


def rank_of(rank, ranks, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    for options in ({}, {"find_unused_parameters": True}):
        unbroken = trained(rank, range(6), None, **options)
        resumed = trained(rank, range(3, 6), trained(rank, range(3), None, **options), **options)
        same = all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
        if rank == 0:
            how = "find_unused_parameters" if options else "as it comes"
            print(f"{ranks} ranks, {how}: {'the same bits' if same else 'other bits'}", flush=True)
    dist.barrier()


if __name__ == "__main__":
    torch.multiprocessing.spawn(rank_of, (int(sys.argv[1]), sys.argv[2]), nprocs=int(sys.argv[1]))
PY
"$work/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
for ranks in 2 4; do
  "$work/venv/bin/python" -W ignore "$work/resumed.py" "$ranks" "$((29500 + RANDOM % 1000))" 2>/dev/null
done | tee "$work/printed"
diff - "$work/printed" <<'EXPECTED' || { echo "it has changed" >&2; exit 1; }
2 ranks, as it comes: the same bits
2 ranks, find_unused_parameters: the same bits
4 ranks, as it comes: other bits
4 ranks, find_unused_parameters: the same bits
EXPECTED
