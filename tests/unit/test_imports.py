"""Imports run one way: the layers named in pyproject.toml hold, and no test takes helpers from a test file."""

import ast
from pathlib import Path

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
