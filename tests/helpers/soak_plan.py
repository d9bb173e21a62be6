"""The faults of a soak (soak.py), and the plan of a run under them, drawn from random numbers."""

import random
import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tests.helpers.job import LANES

STEPS = 24  # of a leg
INSTANTS = 22  # that rank 0 passes in a step, saves and validations included


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
