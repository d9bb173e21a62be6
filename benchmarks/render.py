"""Render the tables of README and docs from docs/results: `make docs`, or `python -m benchmarks.render`.

Between two markers in a Markdown file stands what a result file says; nobody edits it by hand:

    <!-- results: memory_cost -->           the main table of docs/results/memory_cost.json, and where it was measured
    <!-- results: peers narrow -->          its table "narrow"
    <!-- summary: recall passkey books -->  one table of the summary lines of several results
    <!-- end -->

`--check` changes nothing, and fails if a file is not up to date.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
BLOCK = re.compile(r"(<!-- (results|summary): ([\w /-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown_files() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table_of(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def machine_of(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['GFLOP/s']} GFLOP/s in float32 products"


def origin(result: dict[str, Any]) -> str:
    """One sentence on how, when and where a result was measured."""
    code = f"version {result['version']}, commit {result['commit']}, {result['date']}"
    return f"`{result['command']}`, {code}, on {machine_of(result)}."


def results_block(words: list[str]) -> str:
    name, *key = words
    result = load(name)
    table = result["tables"][" ".join(key)]
    return f"\n{table_of(table['columns'], table['rows'])}\n{origin(result)}\n\n"


def summary_block(names: list[str]) -> str:
    rows, machines = list[list[str]](), dict[str, list[str]]()
    for name in names:
        result = load(name)
        rows += [
            [what, figure, f"`{result['command'].removeprefix('python -m ')}`"]
            for what, figure in result["summary"].items()
        ]
        machines.setdefault(machine_of(result), []).append(name)
    if len(machines) == 1:
        where = f"Measured on {next(iter(machines))}."
    else:
        where = "Measured on " + "; ".join(f"{machine} ({', '.join(of)})" for machine, of in machines.items()) + "."
    return f"\n{table_of(['what', 'figure', 'by'], rows)}\n{where}\n\n"


def rendered(text: str) -> str:
    """The text with every block between markers made anew."""
    make = {"results": results_block, "summary": summary_block}
    return BLOCK.sub(lambda found: found[1] + make[found[2]](found[3].split()) + found[4], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a file is not up to date")
    options = parser.parse_args()
    stale = [file for file in markdown_files() if rendered(file.read_text()) != file.read_text()]
    if options.check and stale:
        names = ", ".join(str(file.relative_to(ROOT)) for file in stale)
        sys.exit(f"{names}: found tables that differ from docs/results, expected what `make docs` renders")
    for file in stale:
        file.write_text(rendered(file.read_text()))
        print(f"{file.relative_to(ROOT)}: tables rendered")


if __name__ == "__main__":
    main()
