"""Set-up time of `make train`, side by side with another checkout: python -m benchmarks.installation --base DIR

Each checkout makes a new environment in a temporary directory, in turn, with the caches of pip and uv empty. Wall and
CPU seconds (of all processes) and the size of the environment are printed, medians of the rounds, and the time of the
first `infini-train fit --help` there, which compiles modules that the installation has not compiled. It downloads
several hundred MB each time.
"""

import argparse
import os
import resource
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def measured(command: list[str], checkout: Path, variables: dict[str, str]) -> tuple[float, float]:
    """Run a command in a checkout, and return its wall and CPU seconds. Raises CalledProcessError if it fails."""
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=checkout, env={**os.environ, **variables}, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - begin, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def installed(checkout: Path) -> list[float]:
    """Return the seconds, CPU seconds, MB and first start in seconds of a new environment."""
    with tempfile.TemporaryDirectory() as name:
        venv = Path(name) / "venv"
        variables = {"PIP_NO_CACHE_DIR": "1", "UV_CACHE_DIR": str(Path(name) / "uv")}
        wall, cpu = measured(["make", f"VENV={venv}", str(venv / ".installed")], checkout, variables)
        size = sum(path.lstat().st_size for path in venv.rglob("*") if path.is_file() and not path.is_symlink())
        first, _ = measured([str(venv / "bin" / "infini-train"), "fit", "--help"], checkout, variables)
        return [wall, cpu, size / 1e6, first]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, help="the other checkout; without it only this one is measured")
    parser.add_argument("--rounds", type=int, default=3, help="number of environments that each checkout makes")
    options = parser.parse_args()
    checkouts = {"here": ROOT} | ({"base": options.base.resolve()} if options.base else {})
    found: dict[str, list[list[float]]] = {name: [] for name in checkouts}
    for _ in range(options.rounds):
        for name, checkout in checkouts.items():
            found[name].append(installed(checkout))
    print(f"{'':<8}{'seconds':>10}{'CPU s':>10}{'MB':>10}{'first start':>14}   medians of {options.rounds}")
    for name, rounds in found.items():
        wall, cpu, size, first = map(statistics.median, zip(*rounds, strict=True))
        print(f"{name:<8}{wall:10.1f}{cpu:10.1f}{size:10.0f}{first:14.1f}", flush=True)


if __name__ == "__main__":
    main()
