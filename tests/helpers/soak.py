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
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from infini_train.data.index import DatasetIndex
from infini_train.run_files import complete, latest, read_record, step_of
from infini_train.training.checkpoint_format import fault_of
from tests.helpers.datasets import make_dataset
from tests.helpers.job import CONSTANT, LANES
from tests.helpers.results import LENGTHS, assert_identical, results
from tests.helpers.runs import CONTEXT, arguments, watch_calls

STEPS = 24  # of a leg
INSTANTS = 22  # that rank 0 passes in a step, saves and validations included
GRACE = 20.0  # seconds after the end of a rank in which the others must end by themselves
OPTIONS = (*CONSTANT, "--checkpoint.keep_last", "3", "--data.num_workers", "1")
OPTIONS += ("--data.limit_validation_tokens_per_document", "40")


class Layout(NamedTuple):
    """How a leg is trained."""

    strategy: str
    ranks: int
    accumulate: int

    def words(self) -> list[str]:
        options = {
            "trainer.strategy": self.strategy,
            "trainer.devices": self.ranks,
            "trainer.accumulate_grad_batches": self.accumulate,
            "data.micro_batch_size": LANES // self.ranks // self.accumulate,
        }
        return [word for name, value in options.items() for word in (f"--{name}", str(value))]


FIRST = Layout("zero2", 2, 1)
LAYOUTS = [Layout(s, n, a) for s in ("ddp", "zero1", "zero2", "zero3") for n, a in ((2, 1), (2, 2), (1, 2), (4, 1))]


class Interruption(NamedTuple):
    """What is done to a job once rank 0 has passed so many instants, and some seconds later."""

    name: str
    instants: int = 0
    seconds: float = 0.0


class Round(NamedTuple):
    """A start of the job: what happened to its files before, how its system misbehaves, how it is interrupted."""

    damage: str
    system: tuple[str, ...]
    interruption: Interruption


@dataclass
class Ended:
    """How a job ended: the ranks' exit codes and output; when it began; whether it was interrupted; how many ranks
    did not end by themselves."""

    codes: list[int]
    printed: list[str]
    began: float
    interrupted: bool = False
    left_behind: int = 0

    @property
    def errors(self) -> list[list[str]]:
        """The error messages of each rank."""
        return [re.findall(r"^infini-train(?: fit)?: error: .*", text, re.MULTILINE) for text in self.printed]

    @property
    def refusal(self) -> str | None:
        """The message with which the job was refused; None if it was not, or not in one line of each rank."""
        if 0 in self.codes or any(len(lines) > 1 for lines in self.errors) or "Traceback" in "".join(self.printed):
            return None
        # Where each rank refuses by itself, only the first one looks for an older checkpoint.
        return max((line for lines in self.errors for line in lines), key=len, default=None)


SIGNALS = {
    "SIGTERM to all ranks": signal.SIGTERM,
    "SIGUSR1 to all ranks": signal.SIGUSR1,
    "SIGINT to all ranks": signal.SIGINT,
    "SIGUSR1 to one rank": signal.SIGUSR1,
    "SIGTERM to one rank": signal.SIGTERM,
}
POWER_CUT = "power cut: what was not synced is lost"
KILLS = ("kill -9 of one rank", "kill -9 of all ranks", "kill -9 of a loader worker", "SIGTERM, soon kill -9 of all")
KILLS += (POWER_CUT, POWER_CUT)
DAMAGES = ("latest lost", "latest of an older checkpoint", "latest with garbage", "one bit of a checkpoint flipped")
DAMAGES += ("a file of a checkpoint lost", "run.json lost")
# For each way in which the system fails: its variables, and what the job's error must say.
FAILS: dict[str, tuple[Callable[[random.Random], dict[str, Any]], str]] = {
    "disk full": (lambda draw: {"FULL_AFTER": draw.randrange(20_000, 700_000)}, "No space left on device"),
    "fsync fails": (lambda draw: {"SYNC_FAILS": draw.randrange(1, 80)}, "Input/output error"),
    "a bit flipped on its way to the disk": (lambda draw: {"FLIP_WRITE": draw.randrange(1, 200)}, "read back"),
}
BESIDE: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "slow disk, short writes": lambda draw: {
        "SLOW_US": draw.choice([1000, 5000]),
        "SHORT_WRITES": draw.choice([5000, 100_000]),
    },
    "clock jumps": lambda draw: {
        "CLOCK_JUMP": draw.choice([-1, 1]) * draw.choice([2, 4000, 2_600_000]),
        "CLOCK_AFTER": draw.uniform(0, 4),
    },
}


def plan(draw: random.Random, legs: int, starts: int) -> Iterator[tuple[str, list[Round]]]:
    """Draw the legs of a run: what changes before each, and its rounds."""
    for leg in range(legs):
        change = draw.choice(["layout", "layout", "dataset grows"]) if leg else "none"
        rounds = []
        for _ in range(starts):
            damage = draw.choice(DAMAGES) if draw.random() < 0.4 else "none"
            system = tuple(name for name in BESIDE if draw.random() < 0.25)
            kind = draw.choices([list(SIGNALS), KILLS, list(FAILS)], [4, 4, 3])[0]
            instants = draw.randrange(2 * STEPS * INSTANTS // starts) if draw.random() < 0.85 else 0
            seconds = draw.uniform(0, 0.1) if instants else draw.uniform(0, 4)
            rounds.append(Round(damage, system, Interruption(draw.choice(list(kind)), instants, seconds)))
        yield change, rounds


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
    log: list[str] = field(default_factory=list)

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
        self.extra = ()
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
        assert_identical(found, expected)
        left = [path.name for path in self.checkpoints.glob("*.tmp")]
        assert not left, left
        print(f"  step {end}: the unbroken run's bits", flush=True)
        self.begin = end
        shutil.rmtree(unbroken)

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
        elif name == "run.json lost":
            (self.run / "run.json").unlink()
        else:
            newest = latest(self.checkpoints)
            assert newest is not None
            if not any(step_of(path) < step_of(newest) and fault_of(path) is None for path in there):
                return False
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
            (self.run / "run.json").unlink()  # as the message says
        found = latest(self.checkpoints)
        if found is None or ((found / "COMPLETE").is_file() and fault_of(found) is None):
            return False
        ended = self.job(self.run, end)
        assert ended.refusal is not None and str(found) in ended.refusal, self.told(ended)
        advice = re.search(r"--ckpt_path (\S+) goes on from there", ended.refusal)
        assert advice, self.told(ended)
        # The file `latest` names it as soon as the run begins there, even if that is interrupted before a save.
        began = Interruption("SIGTERM to all ranks", 1, 0.0)
        ended = self.job(self.run, end, "--ckpt_path", advice[1], interruption=began)
        self.judge(began.name, ended)
        return True

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
            assert not ended.left_behind, self.told(ended)
            outcome = "one message, the older checkpoint stays"
        if ended.left_behind:
            outcome += "; the launcher had to end the other ranks"
        known = [str(path) for path in self.known_damage()]
        assert all(any(fault.startswith(path) for path in known) for fault in damaged), damaged
        self.note(name, outcome)

    def known_damage(self) -> list[Path]:
        """The checkpoints that a fault of this soak has damaged and that the run has not replaced yet."""
        newest = latest(self.checkpoints)
        return [path for path in complete(self.checkpoints) if newest is None or step_of(path) > step_of(newest)]

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
        """Train up to a step on the ranks of the layout, as a launcher does that starts each rank by itself."""
        words = (*arguments(run, self.directory / "shards"), *OPTIONS, *self.layout.words(), *self.extra, *words)
        words += ("--trainer.max_steps", str(end))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        count = CONTEXT.Value("i", 0)
        outputs = [Path(tempfile.mkstemp(dir=self.directory, suffix=".txt")[1]) for _ in range(self.layout.ranks)]
        ranks = []
        for rank, output in enumerate(outputs):
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": rank, "NODE_RANK": 0}
            environment = {name: str(value) for name, value in {**environment, **(variables or {})}.items()}
            ranks.append(CONTEXT.Process(target=_rank, args=(rank, words, environment, count, output)))
            ranks[-1].start()
        ended = Ended([], [], time.time())
        hangs, first = time.monotonic() + 400, None
        while any(rank.is_alive() for rank in ranks):
            if interruption is not None and not ended.interrupted and count.value >= interruption.instants:
                time.sleep(interruption.seconds)
                ended.interrupted = True
                self.interrupt(interruption.name, [rank.pid for rank in ranks if rank.is_alive()])
            if first is None and any(rank.exitcode for rank in ranks):
                first = time.monotonic()
            if first is not None and time.monotonic() - first > GRACE:  # srun --kill-on-bad-exit does it at once
                ended.left_behind = sum(rank.is_alive() for rank in ranks)
            if ended.left_behind or time.monotonic() > hangs:
                for rank in ranks:
                    rank.kill()
            time.sleep(0.002)
        for rank in ranks:
            rank.join()
        ended.codes = [int(rank.exitcode or 0) for rank in ranks]
        ended.printed = [output.read_text(errors="replace") for output in outputs]
        for output in outputs:
            output.unlink()
        assert time.monotonic() < hangs, f"the job hangs\n{self.told(ended)}"
        return ended

    def interrupt(self, name: str, pids: list[int]) -> None:
        one = [self.draw.choice(pids)] if pids else []
        if name in SIGNALS:
            signal_all(pids if "all" in name else one, SIGNALS[name])
        elif name == "kill -9 of a loader worker":
            workers = [int(child) for pid in one for child in children(pid)]
            signal_all(workers or pids, signal.SIGKILL)
        else:
            if name.startswith("SIGTERM"):
                signal_all(pids, signal.SIGTERM)
                time.sleep(self.draw.uniform(0, 0.3))
            signal_all(one if "one" in name else pids, signal.SIGKILL)


def signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def children(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []


def _rank(rank: int, words: list[str], environment: dict[str, str], count: Any, output: Path) -> None:
    """`infini-train fit` as one rank, in a process forked from one that has imported everything."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    import torch
    from lightning_utilities.core.rank_zero import rank_zero_only

    from infini_train import commands

    rank_zero_only.rank = rank  # was found when it was imported
    torch.set_num_threads(1)

    def instant() -> None:
        count.value += 1

    if rank == 0:
        watch_calls(instant)
    sys.argv = ["infini-train", *words]
    commands.main()


def faulty_system(directory: Path) -> Path | None:
    """Compile faulty_system.c; None if there is no compiler."""
    library = directory / "faulty_system.so"
    source = Path(__file__).with_name("faulty_system.c")
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


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
