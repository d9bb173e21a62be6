"""slurm/prep.sbatch on a real cluster of two nodes."""

from pathlib import Path

from data_prep.shard import shard_corpus
from data_prep.train_tokenizer import train_tokenizer
from tests.slurm.cluster import ROOT, Cluster, wait_until
from tests.unit.test_data_prep_shard import all_bytes, text

# Elements wait for one another, so that all run at once; the third is killed until there is a file `spare`.
ENVIRONMENT = """
touch "{0}/started-$SLURM_ARRAY_TASK_ID-$(hostname)"
until [ -e "{0}/go" ]; do sleep 0.1; done
[ "$SLURM_ARRAY_TASK_ID" != 2 ] || [ -e "{0}/spare" ] || kill -9 $$
"""


def test_array_job_on_both_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """One element is requeued and one killed; the same submission again mends it, and a third one does nothing."""
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    corpus.mkdir()
    for i in range(20):
        (corpus / f"{i}.txt").write_text(text(i, 300))
    train_tokenizer([corpus], tmp_path / "t.model", vocab_size=290)
    shard_corpus([corpus], tmp_path / "single", tmp_path / "t.model", validation_fraction=0.2, shard_tokens=9000)
    (tmp_path / "environment.sh").write_text(ENVIRONMENT.format(tmp_path))

    def submit() -> tuple[str, list[str]]:
        words = ["sbatch", "--parsable", "--array=0-3", f"--chdir={ROOT}", f"--output={tmp_path}/%A_%a.log"]
        words += [ROOT / "slurm" / "prep.sbatch", corpus, "--tokenizer", tmp_path / "t.model", "--out", out]
        words += ["--validation-fraction", "0.2", "--shard-tokens", "9000", "--workers", "1"]
        job = cluster.run(*words, INFINI_ENVIRONMENT=tmp_path / "environment.sh")
        return job, [f"{job}_{element}" for element in range(4)]

    def ends(elements: list[str]) -> list[str]:
        return [cluster.wait(element, 120) for element in elements]

    def log(element: str) -> str:
        return (tmp_path / f"{element}.log").read_text()

    _, first = submit()
    wait_until(lambda: len(list(tmp_path.glob("started-*"))) == 4, "four elements at work", 60)
    assert {path.name[-2:] for path in tmp_path.glob("started-*")} == {"n1", "n2"}
    cluster.run("scontrol", "requeue", first[1])
    (tmp_path / "go").touch()
    assert ends(first) == ["COMPLETED", "COMPLETED", "FAILED", "COMPLETED"]
    assert not out.exists()
    assert "restart 0" in log(first[1]) and "restart 1" in log(first[1])
    done = {line.split()[-1] for element in first for line in log(element).splitlines() if "is done, on" in line}
    assert done == {"n1", "n2"}

    (tmp_path / "spare").touch()
    _, second = submit()
    assert ends(second) == ["COMPLETED"] * 4
    assert "task 2 of 4 is done, on" in log(second[2])
    assert all("is done already" in log(second[n]) or "nothing to do" in log(second[n]) for n in (0, 1, 3))
    assert all_bytes(out) == all_bytes(tmp_path / "single")
    assert not list(tmp_path.glob(".out*"))

    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.rglob("*")}
    _, third = submit()
    assert ends(third) == ["COMPLETED"] * 4
    assert all("nothing to do" in log(element) for element in third)
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.rglob("*")} == before
