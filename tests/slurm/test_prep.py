"""`infini-train prep shard --executor slurm` on a real cluster of two nodes."""

import re
import sys
from pathlib import Path

from data_prep.shard import append_corpus, shard_corpus
from data_prep.train_tokenizer import train_tokenizer
from tests.helpers.corpora import all_bytes, text
from tests.slurm.cluster import Cluster, wait_until

# Tasks that read wait for one another, so that all run at once; the third is killed until there is a file `spare`.
ENVIRONMENT = """
if [ "$SLURM_JOB_NAME" = infini-prep-read ]; then
  touch "{0}/started-$SLURM_ARRAY_TASK_ID-$(hostname)"
  until [ -e "{0}/go" ]; do sleep 0.1; done
  [ "$SLURM_ARRAY_TASK_ID" != 2 ] || [ -e "{0}/spare" ] || kill -9 $$
fi
"""


def test_array_jobs_on_both_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """One task is requeued and one killed; the same command again mends it, and a third time does nothing. Then more
    documents are appended by jobs, too."""
    corpus, more, out = tmp_path / "corpus", tmp_path / "more", tmp_path / "out"
    for directory, numbers in ((corpus, range(20)), (more, range(18, 30))):
        directory.mkdir()
        for i in numbers:
            (directory / f"{i}.txt").write_text(text(i, 300))
    train_tokenizer([corpus], tmp_path / "t.model", vocab_size=290)
    single = tmp_path / "single"
    shard_corpus([corpus], single, tmp_path / "t.model", validation_fraction=0.2, shard_tokens=9000)
    (tmp_path / "environment.sh").write_text(ENVIRONMENT.format(tmp_path))
    (tmp_path / "cluster.yaml").write_text('time: "00:10:00"\ncpus_per_task: 8\n')

    def prepare(*words: str | Path) -> tuple[list[str], str]:
        """Numbers of the jobs, and what was printed."""
        how = ("--executor", "slurm", "--cluster", tmp_path / "cluster.yaml", "--tasks", "4")
        command = (sys.executable, "-m", "data_prep", *words, *how, "--workers", "4")
        printed = cluster.run(*command, INFINI_ENVIRONMENT=tmp_path / "environment.sh")
        found = re.search(r"submitted ([\d, ]+):", printed)
        return found[1].split(", ") if found else [], printed

    words = ("shard", corpus, "--tokenizer", tmp_path / "t.model", "--out", out)
    words += ("--validation-fraction", "0.2", "--shard-tokens", "9000")
    (read, plan, *_), _ = prepare(*words)
    elements = [f"{read}_{element}" for element in range(4)]
    wait_until(lambda: len(list(tmp_path.glob("started-*"))) == 4, "four tasks at work", 60)
    assert {path.name[-2:] for path in tmp_path.glob("started-*")} == {"n1", "n2"}
    cluster.run("scontrol", "requeue", elements[1])
    (tmp_path / "go").touch()
    assert [cluster.wait(element, 120) for element in elements] == ["COMPLETED", "COMPLETED", "FAILED", "COMPLETED"]
    assert cluster.wait(f"{plan}_0", 60) == "CANCELLED"
    assert not out.exists()

    (tmp_path / "spare").touch()
    parts = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".out.work-*/parts/*.jsonl")}
    assert len(parts) == 3
    jobs, _ = prepare(*words)
    assert len(jobs) == 4
    assert cluster.wait(f"{jobs[0]}_0", 60) == "COMPLETED"
    assert {path: path.stat().st_mtime_ns for path in parts if path.exists()}.items() <= parts.items()
    assert cluster.wait(f"{jobs[-1]}_0", 120) == "COMPLETED"
    assert all_bytes(out) == all_bytes(single)

    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.rglob("*")}
    assert "nothing to do" in prepare(*words)[1]
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.rglob("*")} == before
    assert not list(tmp_path.glob(".out*"))

    jobs, _ = prepare("append", more, "--to", out)
    assert cluster.wait(f"{jobs[-1]}_0", 120) == "COMPLETED"
    append_corpus([more], single)
    assert all_bytes(out) == all_bytes(single)
