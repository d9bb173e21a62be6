"""Write docs/tutorial.ipynb, the notebook of docs/tutorial.md: `make docs`, or `python -m benchmarks.notebook`.

The page is the source. Each block of commands becomes a cell that runs them, and the block of output that follows it
the cell's output; a cell more shows the picture that a command plots.
"""

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
PAGE, NOTEBOOK = DOCS / "tutorial.md", DOCS / "tutorial.ipynb"
BLOCK = re.compile(r"^```sh\n(.*?)^```\n(?:^```\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
RUN = "%%bash -e\n"
SET_UP = """\
# The commands run in the repository's directory, with the programs of this kernel's environment.
import os
import sys
from pathlib import Path

from IPython.display import Image

os.chdir(Path(_dh[0]).parent)  # _dh[0] is the directory of this notebook
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}\""""


def lines(text: str) -> list[str]:
    return text.strip("\n").splitlines(keepends=True)


def markdown_cell(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": lines(text)}


def code_cell(code: str, output: str | None = None) -> dict[str, Any]:
    outputs = [] if output is None else [{"output_type": "stream", "name": "stdout", "text": lines(output)}]
    return {
        "cell_type": "code",
        "metadata": {},
        "execution_count": None,
        "source": lines(code),
        "outputs": outputs,
    }


def notebook(page: str) -> dict[str, Any]:
    """Return the notebook of a page in Markdown, in format 4.5 of Jupyter."""
    cells, position = [], 0
    for block in BLOCK.finditer(page):
        cells.append(markdown_cell(page[position : block.start()]))
        if position == 0:
            cells.append(code_cell(SET_UP))
        commands, output = block.groups()
        cells.append(code_cell(RUN + commands, output))
        cells += [code_cell(f'Image("{picture}")') for picture in re.findall(r"--plot (\S+)", commands)]
        position = block.end()
    cells.append(markdown_cell(page[position:]))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": [{"id": f"cell-{number}", **cell} for number, cell in enumerate(cells)],
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def main() -> None:
    NOTEBOOK.write_text(json.dumps(notebook(PAGE.read_text()), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
