"""Imports run one way: the layers named in pyproject.toml hold, and no test takes helpers from a test file.

And training imports torchmetrics without the packages of metrics that it does not use.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.application import use_cases
from importlinter.configuration import configure

REPOSITORY = Path(__file__).parents[2]


def test_layers_hold(monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    configure()
    assert use_cases.lint_imports(config_filename="pyproject.toml", cache_dir=None), capsys.readouterr().out


def test_no_file_imports_from_a_test_file():
    found = []
    for path in sorted(path for folder in ("tests", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            parts = {part for name in names for part in name.split(".")}
            found += [
                f"{path.relative_to(REPOSITORY)}:{node.lineno}: imports {part}, expected a helper of tests/helpers"
                for part in parts
                if part.startswith("test_")
            ]
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_torchmetrics_without_packages_of_metrics():
    unused = ("matplotlib", "scipy.signal", "transformers")
    for package in unused:
        pytest.importorskip(package)  # what is not installed cannot be imported by mistake
    code = f"""
import sys
from infini_train.training import lightning_patches
lightning_patches.import_torchmetrics()
print("torchmetrics" in sys.modules, [package for package in {unused} if package in sys.modules])
import scipy.signal, torchmetrics  # both still work
print(torchmetrics.MeanMetric()(2.0).item())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["True []", "2.0"]
