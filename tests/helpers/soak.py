"""Runs of a tiny model under a stream of faults drawn from a seed: python -m tests.helpers.soak --seed 0 --minutes 60

A run goes in legs. Before each leg but the first, something changes that a user may change: the number of ranks,
the strategy or the training dataset, which grows. The leg is then trained twice from the same checkpoint: once
unbroken in a copy, and once under faults. Both must end with the same bits in weights, optimizer, memories and logged
values. A checkpoint that was damaged must be refused in one line, whose advice is followed. faulty_system.c makes the
disk and the clock fail.

Runs follow one another, each with the next seed, until the time is over. A table of the faults is printed at the end.
"""

import argparse
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from infini_train.data.index import DatasetIndex
from infini_train.run_files import complete, latest, read_record, step_of
from infini_train.training.checkpoint_directory import identity
from infini_train.training.checkpoint_format import fault_of
from tests.helpers.datasets import make_dataset
from tests.helpers.job import CONSTANT
from tests.helpers.results import LENGTHS, assert_identical, results
from tests.helpers.runs import CONTEXT, arguments
from tests.helpers.soak_job import Ended, faulty_system, run_job
from tests.helpers.soak_plan import (
    BESIDE,
    FAILS,
    FIRST,
    LAYOUTS,
    POWER_CUT,
    SIGNALS,
    STEPS,
    Interruption,
    Layout,
    Round,
    plan,
)

KEPT = 3  # checkpoints
OPTIONS = (*CONSTANT, "--checkpoint.keep_last", str(KEPT), "--data.num_workers", "1")
OPTIONS += ("--data.limit_validation_tokens_per_document", "40")


@dataclass
class Soak:
    """One run under faults.

    Attributes:
        directory: of the run, its copies and its dataset.
        draw: the random numbers of the run.
        library: faulty_system.c, compiled; None: there is no compiler, and system and clock do not fail.
        table: how often each fault was tried, by its outcome.
    """

    directory: Path
    draw: random.Random
    library: Path | None
    table: Counter[tuple[str, str]]
    layout: Layout = FIRST
    begin: int = 0  # step at which the leg begins
    extra: tuple[str, ...] = ()  # options of the leg
    growths: int = 0
    began: float = 0.0  # when the last start of the run began
    log: list[str] = field(default_factory=list)
    damaged: set[int] = field(default_factory=set)  # numbers of the directories of checkpoints that were damaged
    disowned: set[str] = field(default_factory=set)  # checkpoints that the run cannot know as its own any more
    sent_back: bool = False  # in this leg `latest` has named an older checkpoint

    @property
    def run(self) -> Path:
        return self.directory / "run"

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    def note(self, fault: str, outcome: str) -> None:
        self.table[fault, outcome] += 1
        self.log.append(f"{fault}: {outcome}")
        print(f"    {fault}: {outcome}", flush=True)

    def all(self, legs: int, starts: int) -> None:
        """Train all legs."""
        make_dataset(self.directory / "shards", LENGTHS)
        for change, rounds in plan(self.draw, legs, starts):
            self.leg(change, rounds)

    def leg(self, change: str, rounds: list[Round]) -> None:
        self.extra, self.sent_back = (), False
        if change == "layout":
            before, self.layout = self.layout, self.draw.choice([x for x in LAYOUTS if x != self.layout])
            what = "number of ranks" if self.layout.ranks != before.ranks else "strategy or accumulation"
            self.note(f"another {what}", "goes on")
        if change == "dataset grows":
            self.grow()
        print(f"  leg from step {self.begin}: {self.layout}, {' '.join(self.extra)}", flush=True)
        unbroken = self.directory / f"unbroken-{self.begin}"
        if self.begin:
            shutil.copytree(self.run, unbroken)
        end = self.begin + STEPS
        ended = self.job(unbroken, end)
        assert ended.codes == [0] * self.layout.ranks, self.told(ended)
        for number, one in enumerate(rounds):
            print(f"   {number}: {one}", flush=True)
            if self.one_round(one, end):
                break
        else:
            self.go_on(end)
        found, expected = results(self.run), results(unbroken)
        for one in (found, expected):
            one["state"].pop("loops")  # Lightning counts its own restarts
            one["curves"] = {
                name: [(step, value) for step, value in points if step > self.begin]
                for name, points in one["curves"].items()
            }
        if self.sent_back:
            # A start from the older checkpoint makes tensorboard drop the later points. They are logged again, unless
            # that start reaches no step and the next one finds the newer checkpoint, because `latest` is lost then.
            assert found["curves"].keys() == expected["curves"].keys()
            for name, points in found["curves"].items():
                assert set(points) <= set(expected["curves"][name]), name
                expected["curves"][name] = points
        assert_identical(found, expected)
        left = [path.name for path in self.checkpoints.glob("*.tmp")]
        assert not left, left
        self.check_kept()
        print(f"  step {end}: the unbroken run's bits", flush=True)
        self.begin = end
        shutil.rmtree(unbroken)

    def check_kept(self) -> None:
        """Check that the run knows its own checkpoints, and keeps no more of them than it was told."""
        saved = read_record(self.run)["saved"]
        there = complete(self.checkpoints)
        own = [path for path in there if saved.get(path.name, "") == identity(path)]
        foreign = {path.name for path in there} - {path.name for path in own}
        assert foreign <= self.disowned, (foreign, self.disowned, self.log)
        newest = latest(self.checkpoints)
        assert newest is not None
        # Old checkpoints are removed after a save. Where that was interrupted and the last start had nothing to save,
        # one more is left.
        most = KEPT if newest.stat().st_mtime >= self.began else KEPT + 1
        assert len([path for path in own if step_of(path) <= step_of(newest)]) <= most, own

    def lose_record(self) -> None:
        (self.run / "run.json").unlink()
        self.disowned |= {path.name for path in complete(self.checkpoints)}

    def grow(self) -> None:
        """Append documents to the dataset; the run must be told to accept them."""
        root, self.growths = self.directory / "shards", self.growths + 1
        more = self.directory / "more"
        make_dataset(more, [60, 150, 9, 80], seed=self.growths)
        old, new = DatasetIndex.load(root), DatasetIndex.load(more)
        for shard in new.shards:
            os.rename(more / shard.name, root / f"more-{self.growths}-{shard.name}")
        shards = [replace(shard, name=f"more-{self.growths}-{shard.name}") for shard in new.shards]
        index = DatasetIndex.concatenated(root, [old, replace(new, shards=shards)])
        before = {"shards": len(old.shards), "documents": old.documents}
        index.options = {**old.options, "appended": [*old.options.get("appended", []), before]}
        index.save()
        shutil.rmtree(more)
        ended = self.job(self.run, self.begin + 1)
        assert ended.refusal is not None and "has grown from" in ended.refusal, self.told(ended)
        self.extra = ("--data.allow_growth", "true")
        self.note("the dataset grows", "refused in one line; goes on when allowed")

    def one_round(self, one: Round, end: int) -> bool:
        """Return whether the run has reached the end of the leg."""
        damaged = one.damage != "none" and self.damage(one.damage)
        refused = self.refused(end)
        if damaged:
            outcome = "refused in one line; goes on from the checkpoint that it names" if refused else "goes on"
            self.note(one.damage, outcome)
        variables: dict[str, Any] = {"FAULTY_DIR": self.run}
        if self.library is not None:
            for name in one.system:
                variables |= BESIDE[name](self.draw)
                self.note(name, "goes on")
        name, said = one.interruption.name, ""
        if name in FAILS:
            if self.library is None:
                return False
            make, said = FAILS[name]
            variables |= make(self.draw)
        if name == POWER_CUT:
            if self.library is None:
                return False
            variables |= {"SYNC_LOG": self.directory / "syncs", "SLOW_US": 3000}
        ended = self.job(self.run, end, variables=variables, interruption=None if said else one.interruption)
        if ended.interrupted and name == POWER_CUT:
            self.lose_unsynced(self.directory / "syncs")
        for file in self.directory.glob("syncs*"):
            file.unlink()
        self.judge(name, ended, said)
        return ended.codes == [0] * self.layout.ranks

    def lose_unsynced(self, log: Path) -> None:
        """Leave on the disk what a power cut would: files may lack what was written, names may be the old ones.

        Tensorboard's files are left alone, which nothing waits for.
        """
        unsynced: dict[str, None] = {}  # files, by their names now
        renamed: list[tuple[str, str, str]] = []
        for line in log.read_text().splitlines() if log.exists() else []:
            what, path, to, replaced = line.split("\t")
            if what == "write":
                unsynced[path] = None
            elif what == "sync":
                unsynced.pop(path, None)
                renamed = [one for one in renamed if str(Path(one[1]).parent) != path]
            else:
                renamed.append((path, to, replaced))
                unsynced = {
                    to + name[len(path) :] if (name + "/").startswith(path + "/") else name: None for name in unsynced
                }
        for name in unsynced:
            if os.path.isfile(name) and "/tensorboard/" not in name:
                os.truncate(name, self.draw.randrange(os.path.getsize(name) + 1))
        undone = self.draw.randint(0, len(renamed))  # names reach the disk in their order
        for path, to, replaced in reversed(renamed[len(renamed) - undone :]):
            if os.path.exists(to) and not os.path.exists(path):
                os.rename(to, path)
                if replaced:
                    os.rename(replaced, to)

    def go_on(self, end: int) -> None:
        """Train to the end without a fault."""
        self.refused(end)
        ended = self.job(self.run, end)
        assert ended.codes == [0] * self.layout.ranks, self.told(ended)

    def damage(self, name: str) -> bool:
        """Do this to the run's files; return False if they have nothing to which it could be done."""
        there = [path for path in complete(self.checkpoints) if step_of(path) >= max(1, self.begin)]
        pointer = self.checkpoints / "latest"
        if len(there) < 2 or not pointer.is_file():
            return False
        if name == "latest lost":
            pointer.unlink()
        elif name == "latest with garbage":
            pointer.write_bytes(self.draw.choice([b"", b"\0" * 13, b"step-", b"step-99999999", b"\xff\xfe"]))
        elif name == "latest of an older checkpoint":
            pointer.write_text(self.draw.choice(there[:-1]).name)
            self.sent_back = True
        elif name == "run.json lost":
            self.lose_record()
        else:
            newest = latest(self.checkpoints)
            assert newest is not None
            if not any(step_of(path) < step_of(newest) and fault_of(path) is None for path in there):
                return False
            self.disowned.add(newest.name)
            self.damaged.add(newest.stat().st_ino)
            file = self.draw.choice(sorted(newest.iterdir()))
            if name == "a file of a checkpoint lost":
                file.unlink()
            else:
                content = bytearray(file.read_bytes())
                bit = self.draw.randrange(8 * len(content))
                content[bit // 8] ^= 1 << bit % 8
                file.write_bytes(content)
        return True

    def refused(self, end: int) -> bool:
        """Where the newest checkpoint is damaged: check the refusal and do what it says. Return whether it was so."""
        try:
            read_record(self.run)
        except ValueError:  # a bit of it was flipped on its way to the disk
            ended = self.job(self.run, end)
            assert ended.refusal is not None and "run.json: damaged" in ended.refusal, self.told(ended)
            self.lose_record()  # as the message says
        found = latest(self.checkpoints)
        if found is None or ((found / "COMPLETE").is_file() and fault_of(found) is None):
            return False
        ended = self.job(self.run, end)
        assert ended.refusal is not None and str(found) in ended.refusal, self.told(ended)
        advice = re.search(r"--ckpt_path (\S+) goes on from there", ended.refusal)
        assert advice, self.told(ended)
        # The file `latest` names it as soon as the run has loaded it, even if that is interrupted before a save. A
        # signal that comes before all ranks have their handlers ends the job earlier: then it comes later.
        for seconds in range(0, 60, 3):
            began = Interruption("SIGTERM to all ranks", 1, float(seconds))
            ended = self.job(self.run, end, "--ckpt_path", advice[1], interruption=began)
            self.judge(began.name, ended)
            if latest(self.checkpoints) != found:
                return True
        raise AssertionError(f"`latest` still names the damaged checkpoint\n{self.told(ended)}")

    def judge(self, name: str, ended: Ended, said: str = "") -> None:
        """Check how a job ended to which this was done."""
        text = "".join(ended.printed)
        whole = ended.codes == [0] * self.layout.ranks
        damaged = [fault for path in complete(self.checkpoints) if (fault := fault_of(path))]
        outcome = "ended"
        if whole:
            outcome = "reached no checkpoint" if said else "the run had ended before"
        if name in SIGNALS and not whole:
            # No handler was installed yet.
            starting = any(code < 0 for code in ended.codes) or "KeyboardInterrupt" in text
            assert "Traceback" not in text or starting, self.told(ended)
            outcome = "ended while starting"
            if not starting:
                number = SIGNALS[name]
                assert set(ended.codes) <= {128 + number, 128 + signal.SIGTERM}, self.told(ended)
                assert not ended.left_behind, self.told(ended)
                saved = latest(self.checkpoints)
                trained = self.last_logged(ended.began)
                assert trained is None or (saved is not None and step_of(saved) == trained), (saved, trained)
                outcome = f"exit code {128 + number}, every step saved"
        if said and not whole:
            assert 0 not in ended.codes, self.told(ended)
            assert "Traceback" not in text, self.told(ended)
            assert any(said in line for lines in ended.errors for line in lines), self.told(ended)
            # Before the ranks have met, the others wait for the one that failed; then the size of the model is told.
            assert not ended.left_behind or "infini-train: model of " not in text, self.told(ended)
            outcome = "one message, the older checkpoint stays"
        if ended.left_behind:
            outcome += "; the launcher had to end the other ranks"
        known = [str(path) for path in self.known_damage()]
        assert all(any(fault.startswith(path) for path in known) for fault in damaged), damaged
        self.note(name, outcome)

    def known_damage(self) -> list[Path]:
        """The checkpoints that a fault of this soak has damaged and that the run has not replaced yet."""
        return [path for path in complete(self.checkpoints) if path.stat().st_ino in self.damaged]

    def last_logged(self, began: float) -> int | None:
        """The last step whose loss a process that began at this time has logged; names of files are of its clock."""
        files = [file for file in (self.run / "tensorboard").glob("events.*") if file.stat().st_mtime >= began]
        events = [event for file in files for event in EventFileLoader(str(file)).Load()]
        steps = [event.step for event in events if any(v.tag == "train/loss" for v in event.summary.value)]
        return max(steps, default=None)

    def told(self, ended: Ended) -> str:
        parts = [f"rank {rank}: exit code {code}" for rank, code in enumerate(ended.codes)]
        return "\n".join([str(self.directory), *self.log, *parts, *(text[-4000:] for text in ended.printed)])

    def job(
        self,
        run: Path,
        end: int,
        *words: str,
        variables: dict[str, Any] | None = None,
        interruption: Interruption | None = None,
    ) -> Ended:
        """Train up to a step on the ranks of the layout."""
        words = (*arguments(run, self.directory / "shards"), *OPTIONS, *self.layout.words(), *self.extra, *words)
        words += ("--trainer.max_steps", str(end))
        ended = run_job(words, self.layout.ranks, self.directory, self.draw, variables or {}, interruption)
        if run == self.run:
            self.began = ended.began
        assert not ended.hangs, f"the job hangs\n{self.told(ended)}"
        return ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first run")
    parser.add_argument("--minutes", type=float, default=60.0, help="no run begins after so many minutes")
    parser.add_argument("--legs", type=int, default=4, help="legs of a run")
    parser.add_argument("--starts", type=int, default=5, help="starts in a leg that are interrupted")
    options = parser.parse_args()
    CONTEXT.set_forkserver_preload(["infini_train.cli", "deepspeed"])
    table: Counter[tuple[str, str]] = Counter()
    failed: list[int] = []
    begin, seed = time.monotonic(), options.seed
    directory = Path(tempfile.mkdtemp(prefix="soak-"))
    library = faulty_system(directory)
    if library is None:
        print("no C compiler (cc): disk and clock do not fail in this soak", flush=True)
    else:
        os.environ["LD_PRELOAD"] = str(library)  # of the process from which all ranks are forked
    while seed == options.seed or time.monotonic() - begin < 60 * options.minutes:
        print(f"seed {seed}, minute {(time.monotonic() - begin) / 60:.0f}", flush=True)
        root = directory / str(seed)
        root.mkdir()
        try:
            Soak(root, random.Random(seed), library, table).all(options.legs, options.starts)
        except AssertionError as error:
            print(f"seed {seed}: FAILED: {error}", flush=True)
            failed.append(seed)
        else:
            shutil.rmtree(root)
        seed += 1
    print("\n| fault | times | outcome |\n|---|---|---|")
    for (fault, outcome), times in sorted(table.items()):
        print(f"| {fault} | {times} | {outcome} |")
    if failed:
        sys.exit(f"failed: seeds {failed}, whose runs are in {directory}")
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
