"""launch/preflight.py, what takes longer: faults in the sums, signals, room for checkpoints."""

import json
import re
import shutil
import signal
import time

import pytest
import torch
import yaml

from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.preemption import MARKER
from infini_train.run_files import COMPLETE
from tests.helpers.preflight_cluster import CHECKPOINT, CONFIG, Cluster, ended, faults

pytestmark = pytest.mark.slow
BEFORE_SUMS = "import os, time, torch.distributed as dist; right = dist.all_reduce\n"


def test_slow_node_is_warned_of(tmp_path):
    """Sums with it are slow, also those of its neighbours, which are not named."""
    cluster = Cluster(tmp_path, ["n0", "n1", "n2"])
    slow = BEFORE_SUMS + "dist.all_reduce = lambda x: (time.sleep(1), right(x))"
    end = cluster.preflight({1: slow})
    assert end.codes == [0, 0, 0], end.err
    assert faults(end) == []
    named = re.findall(r"node (\w+), global ranks? [\d, -]+: slow: sums with", end.err)
    assert named == ["n1"]


def test_wrong_sum(tmp_path):
    cluster = Cluster(tmp_path, ["n0", "n1", "n2"])
    wrong = BEFORE_SUMS + "dist.all_reduce = lambda x: (x[5:7].add_(1), right(x))"
    end = cluster.preflight({1: wrong})
    assert end.codes == [1, 1, 1]
    lines = faults(end)
    assert len(lines) == 3  # two neighbours, and all
    for line in lines:
        assert re.match(
            r"preflight: node n1, global rank 1: sum over .*: 8 entries wrong", line
        )  # 2 in each of 4 sums


def test_rank_dies_in_a_sum(tmp_path):
    cluster = Cluster(tmp_path, ["n0", "n1"])
    end = cluster.preflight({1: BEFORE_SUMS + "dist.all_reduce = lambda x: os.kill(os.getpid(), 9)"})
    assert end.codes == [1, -9]
    assert faults(end) == ["preflight: node n1, global rank 1: died or hangs at: sum over the nodes of ranks 0, 1"]
    assert cluster.left() == []


def test_rank_hangs_while_it_examines_itself(tmp_path):
    cluster = Cluster(tmp_path, ["n0", "n1"])
    hang = "import os, time; os.fsync = lambda file: time.sleep(1000)"  # as a disk of the network may
    end = cluster.preflight({1: hang}, {0: {"timeout": "15"}, 1: {"timeout": "25"}})
    assert end.codes == [1, 1]
    expected = "not done after 15 s with: run directory"
    assert faults(end) == [f"preflight: node n1, global rank 1: {expected}"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_while_waiting(tmp_path, number):
    cluster = Cluster(tmp_path, ["n0", "n1"])
    process = cluster.start(0, **{MARKER: str(tmp_path / "preempted")})
    while not cluster.left() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    end = ended([process], 30)
    assert end.codes == [128 + number], end.err
    assert cluster.left() == []
    # SIGTERM also comes from srun, when another rank has failed: no reason to start again.
    assert (tmp_path / "preempted").exists() == (number == signal.SIGUSR1)


def test_room(tmp_path):
    cluster = Cluster(tmp_path, ["n0"])
    complete = cluster.run / CHECKPOINT
    assert complete.name == COMPLETE

    free = shutil.disk_usage(tmp_path).free
    complete.write_text(json.dumps({"state": free, "lanes": 10**11}))
    end = cluster.preflight()
    assert end.codes == [1]
    assert re.search(r"room: run: found [\d.]+ GB free, expected at least [\d.]+ GB .*step-00000003", faults(end)[0])

    complete.write_text(json.dumps({"state": int(free / 1.5)}))  # keep_last is 2: two more, at the same time
    end = cluster.preflight()
    assert end.codes == [0]
    assert "preflight: warning: node n0, global rank 0: room: " in end.err

    complete.unlink()
    model = {"hidden_size": 32768, "intermediate_size": 131072, "num_hidden_layers": 120, "vocab_size": 100}
    model |= {"num_attention_heads": 256, "num_key_value_heads": 128}
    config = {**CONFIG, "model": {**model, "optimizer": {"name": "adamw"}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with torch.device("meta"):
        count = sum(p.numel() for p in InfiniForCausalLM(InfiniConfig(**model)).parameters())
    assert 12 * count > free
    end = cluster.preflight()
    assert end.codes == [1]
    assert (
        f"at least {12 * count / 1e9:.2f} GB for a checkpoint (12 bytes for each of {count:,} par" in faults(end)[0]
    )
