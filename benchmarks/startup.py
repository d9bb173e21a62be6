"""Start-up time of the commands, side by side with another checkout: python -m benchmarks.startup --base DIR

Each command runs in turn from this checkout and from the other one. The medians in seconds and their
ratio are printed.
`fit, one step` is the time from the start of the process to the end of its first optimizer step, with
configs/debug.yaml on a tiny dataset; the time to save its checkpoint and to leave is not part of it. Both checkouts
train with the configuration of the other one, which may be too old for options of today.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.datasets import make_dataset

ROOT = Path(__file__).resolve().parent.parent
# For each measurement the words after `python -m`, from this checkout and from one without `infini-train prep`.
COMMANDS = {
    "infini-train --help": ("infini_train --help", "infini_train --help"),
    "infini-train prep --help": ("infini_train prep --help", "data_prep --help"),
    "infini-train inspect --help": ("infini_train inspect --help", "infini_train inspect --help"),
    "infini-train inspect RUN": ("infini_train inspect RUN", "infini_train inspect RUN"),
    "infini-train fit --help": ("infini_train fit --help", "infini_train fit --help"),
}
FIT = "infini_train fit --config CONFIG --data.train SHARDS --run RUN --trainer.max_steps 2"
FIT += " --trainer.log_every_n_steps 1"


def started(checkout: Path, words: list[str], directory: Path) -> subprocess.Popen[str]:
    """Start `python -m WORDS` with the code of a checkout."""
    variables = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=directory, env=variables, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def seconds(checkout: Path, words: list[str], directory: Path) -> float:
    """Return how long a command takes. Raises RuntimeError if it fails."""
    begin = time.perf_counter()
    process = started(checkout, words, directory)
    printed, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{checkout}: {' '.join(words)}: {printed}")
    return time.perf_counter() - begin


def seconds_to_first_step(checkout: Path, words: list[str], directory: Path) -> float:
    """Return how long `fit` takes until it prints its first step. Raises RuntimeError if it prints none."""
    begin = time.perf_counter()
    process = started(checkout, words, directory)
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("step 1/"):
            found = time.perf_counter() - begin
            process.communicate()
            return found
    raise RuntimeError(f"{checkout}: {' '.join(words)}: {''.join(printed)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, help="the other checkout; without it only this one is measured")
    parser.add_argument("--rounds", type=int, default=5, help="number of times that each command runs")
    parser.add_argument("--only", default="", help="measure only the commands whose names contain this text")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_dataset(directory / "shards", [3000, 450, 1200, 2000])
        config = str((options.base or ROOT).resolve() / "configs" / "debug.yaml")
        fit = FIT.replace("CONFIG", config).replace("SHARDS", "shards")
        seconds(ROOT, fit.replace("RUN", "run").split(), directory)  # the run that `inspect` reads
        checkouts = [ROOT] if options.base is None else [ROOT, options.base.resolve()]
        print(f"{'':<30}{'here':>8}{'base':>8}{'ratio':>8}   medians of {options.rounds}, seconds")
        for title, commands in {**COMMANDS, "fit, one step": (fit, fit)}.items():
            if options.only not in title:
                continue
            times: dict[Path, list[float]] = {checkout: [] for checkout in checkouts}
            for number in range(options.rounds):
                for checkout, command in zip(checkouts, commands, strict=False):
                    if command == fit:
                        words = command.replace("RUN", f"{checkout.name}-{number}").split()
                        times[checkout].append(seconds_to_first_step(checkout, words, directory))
                    else:
                        times[checkout].append(seconds(checkout, command.replace("RUN", "run").split(), directory))
            medians = [statistics.median(found) for found in times.values()]
            ratio = f"{medians[1]:8.3f}{medians[0] / medians[1]:8.2f}" if options.base else ""
            print(f"{title:<30}{medians[0]:8.3f}{ratio}", flush=True)


if __name__ == "__main__":
    main()
