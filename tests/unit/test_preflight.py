"""`infini-train preflight` as real processes on simulated nodes, with planted faults: the right node is named."""

import os
import shutil

import pytest
import torch
import yaml

from launch import preflight_checks as checks
from launch.preflight_board import RankLocation
from tests.helpers.preflight_cluster import CONFIG, ROOT, Cluster, ended, faults


def test_all_well(tmp_path):
    cluster = Cluster(tmp_path, ["n1", "n1", "n2"])
    end = cluster.preflight()
    assert end.codes == [0, 0, 0], end.err
    assert faults(end) == []
    last = end.out.splitlines()[-1]
    assert last.startswith("preflight: all 3 ranks on 2 nodes are well; data.train: 5 of 5 shards read")
    assert "sums over all ranks at" in last
    rows = [line.split() for line in end.out.splitlines() if line.startswith("│ n")]
    assert [row[1] for row in rows] == ["n1", "n2"]
    assert [row[3] for row in rows] == ["0-1", "2"]
    assert max(map(len, end.out.splitlines()[:-1])) <= 118
    assert cluster.left() == []


def test_every_fault_is_found_at_its_node(tmp_path):
    cluster = Cluster(tmp_path, ["n0", "n1", "n2", "n3", "n4"])
    # n1 reads other bytes than were written, in a shard of the same size.
    (cluster.of(1) / "train").unlink()
    shutil.copytree(tmp_path / "train", cluster.of(1) / "train")
    for shard in (cluster.of(1) / "train").glob("*.tar"):
        content = bytearray(shard.read_bytes())
        content[700] ^= 1
        shard.write_bytes(content)
    # n2 has stale code and another transformers.
    shutil.copytree(ROOT / "infini_train", tmp_path / "stale" / "infini_train")
    with open(tmp_path / "stale" / "infini_train" / "cli.py", "a") as file:
        file.write("# changed\n")
    (tmp_path / "stale" / "transformers-9.9.dist-info").mkdir()
    (tmp_path / "stale" / "transformers-9.9.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 9.9\n")
    # n3's clock is an hour ahead. n4 has its own disk where the others have the run.
    clock = "import time; right = time.time; time.time = lambda: right() + 3600"
    (cluster.of(4) / "run").unlink()
    (cluster.of(4) / "run").mkdir()

    end = cluster.preflight({3: clock}, {2: {"PYTHONPATH": str(tmp_path / "stale")}})

    assert end.codes == [1] * 5
    found = sorted(faults(end))
    expected = [
        "node n1, global rank 1: data.train: shard train/shard-",
        "node n1, global rank 1: data.validation: shard train/shard-",
        "node n2, global rank 2: sha256 of infini_train's code: found ",
        "node n2, global rank 2: transformers: found 9.9, expected ",
        "node n3, global rank 3: clock: found +3600.0 s",
        "node n4, global rank 4: run directory: run: found no file that rank 0 has made there",
    ]
    assert len(found) == len(expected), end.err
    for line, begin in zip(found, expected, strict=True):
        assert line.startswith(f"preflight: {begin}")
    assert "as on 4 of 5 ranks (node n0)" in found[2] and "sha256 found" in found[0]
    states = {line.split()[1]: "at fault" in line for line in end.out.splitlines() if line.startswith("│ n")}
    assert states == {"n0": False, "n1": True, "n2": True, "n3": True, "n4": True}
    assert cluster.left() == [] and not any((cluster.of(4) / "run").iterdir())


def test_a_rank_that_never_comes_is_named_with_its_node(tmp_path):
    cluster = Cluster(tmp_path, ["n1", "n2"])
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    end = ended([cluster.start(0, timeout="3", PATH=f"{scontrol.parent}:{os.environ['PATH']}", **slurm)], 30)
    assert end.codes == [1]
    assert faults(end) == ["preflight: node n2, global rank 1: never came"]
    assert cluster.left() == []
    unknown = ended([cluster.start(0, timeout="3")], 30)
    assert faults(unknown) == ["preflight: node ?, global rank 1: never came; nodes that did report: n1"]


def test_without_rank_0(tmp_path):
    end = ended([Cluster(tmp_path, ["n1", "n2"]).start(1, timeout="2")], 30)
    assert end.codes == [1]
    assert [line[:60] for line in faults(end)] == ["preflight: node n2, global rank 1: found no rank 0 at 127.0."]


def test_bad_configuration(tmp_path):
    cluster = Cluster(tmp_path, ["n1"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "data": {"train": "train"}}))
    end = cluster.preflight()
    assert end.codes == [2]
    (line,) = faults(end)
    assert line == (
        "preflight: node n1, global rank 0: config: config.yaml: found no data.validation, data.segment_length; "
        "expected what `fit --print_config` writes"
    )
    assert cluster.left() == []


@pytest.mark.parametrize("text", [None, "a: [", "- 1", "", "run: x", "data:\ntrainer:\n"])
def test_no_configuration(tmp_path, text):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=r"config\.yaml"):
        checks.read_config(path)


def test_no_gpu():
    location = RankLocation(9, 16, torch.cuda.device_count(), "n1")
    with pytest.raises(ValueError, match=r"found \d+ GPUs, expected one for local rank \d+"):
        checks.device("gpu", location, [])


@pytest.mark.parametrize("nodes", range(1, 9))
def test_every_pair_of_neighbours_adds_once(nodes):
    rounds = checks.ring(nodes)
    pairs = [frozenset(pair) for edges in rounds for pair in edges]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == {frozenset({i, (i + 1) % nodes}) for i in range(nodes)} - {frozenset({0})}
    for edges in rounds:
        ends = [node for edge in edges for node in edge]
        assert len(ends) == len(set(ends))
