"""Set-up and main job of `make train`, beside another checkout: python -m benchmarks.installation --base DIR

Each checkout is cloned in turn into a temporary directory, where a new environment is made with the caches of pip and
uv empty. Wall and CPU seconds (of all processes) and the size of the environment are measured, and the time of the
first `infini-train fit --help` there, which compiles modules that the installation has not compiled. Figures are
medians of the rounds. With `--job`, `make train` then runs there to its end, in the first round alone. Each set-up
downloads several hundred MB; nothing else may run on the machine.
"""

import os
import resource
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from rich.table import Table

from benchmarks import results

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("set-up, s", "set-up, CPU s", "environment, MB", "first start, s", "make train after it, s")


def measured(command: list[str], checkout: Path, variables: dict[str, str]) -> tuple[float, float]:
    """Run a command in a checkout, and return its wall and CPU seconds. Raises CalledProcessError if it fails."""
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=checkout, env={**os.environ, **variables}, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - begin, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def installed(checkout: Path, job: bool) -> list[float]:
    """Return the figures of COLUMNS for a new clone, the last one only with `job`."""
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name) / "clone"
        subprocess.run(["git", "clone", "--quiet", checkout, clone], check=True)
        venv = clone / ".venv"
        variables = {"PIP_NO_CACHE_DIR": "1", "UV_CACHE_DIR": str(Path(name) / "uv")}
        wall, cpu = measured(["make", ".venv/.installed"], clone, variables)
        size = sum(path.lstat().st_size for path in venv.rglob("*") if path.is_file() and not path.is_symlink())
        first, _ = measured([str(venv / "bin" / "infini-train"), "fit", "--help"], clone, variables)
        found = [wall, cpu, size / 1e6, first]
        return [*found, measured(["make", "train"], clone, variables)[0]] if job else found


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--base", type=Path, help="the other checkout; without it only this one is measured")
    parser.add_argument("--rounds", type=int, default=3, help="number of environments that each checkout makes")
    parser.add_argument("--job", action="store_true", help="also run `make train` to its end, once")
    options = parser.parse_args()
    checkouts = {"now": ROOT} | ({"before": options.base.resolve()} if options.base else {})
    found: dict[str, list[list[float]]] = {name: [] for name in checkouts}
    for number in range(options.rounds):
        for name, checkout in checkouts.items():
            found[name].append(installed(checkout, options.job and number == 0))
    columns = COLUMNS if options.job else COLUMNS[:-1]
    table = Table("build", *columns, title=f"medians of {options.rounds}")
    medians = {
        name: [statistics.median(values[i] for values in rounds if i < len(values)) for i in range(len(columns))]
        for name, rounds in found.items()
    }
    for name, values in medians.items():
        table.add_row(name, *(f"{value:,.1f}" if value < 10 else f"{value:,.0f}" for value in values))
    if options.base:
        table.add_row("ratio", *(f"{a / b:.2f}" for a, b in zip(medians["now"], medians["before"], strict=True)))
    results.report("installation", {"": table}, found, {}, options.results)


if __name__ == "__main__":
    main()
