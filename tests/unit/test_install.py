"""launch/install.py looks where pip would, and falls back to pip; pip itself prints the configuration."""

import os
import subprocess
import sys
from itertools import pairwise

import pytest

from launch import install


def configured(tmp_path, file: str, **variables: str) -> dict[str, str]:
    """What install.py makes of pip's configuration in a file and in environment variables."""
    (tmp_path / "pip.conf").write_text(file)
    others = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment = {**others, "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), **variables}
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return install.pip_configuration(listed)


def test_indexes_of_pip(tmp_path):
    file = """
[global]
index-url = https://one.example/simple
find-links = /wheels
[install]
index-url = https://two.example/a=b/simple
extra-index-url =
    https://three.example/simple
    https://four.example/simple
"""
    found = configured(tmp_path, file, PIP_FIND_LINKS="/other/wheels", PIP_NO_INDEX="1")
    words = install.uv_options(found)
    pairs = list(pairwise(words))
    assert [value for name, value in pairs if name == "--index-url"] == ["https://two.example/a=b/simple"]
    extra = [value for name, value in pairs if name == "--extra-index-url"]
    assert extra == ["https://three.example/simple", "https://four.example/simple"]
    assert [value for name, value in pairs if name == "--find-links"] == ["/other/wheels"]
    assert "--no-index" in words and "--torch-backend" not in words


@pytest.mark.parametrize("writes", [True, False])
def test_where_pip_is_not_configured(monkeypatch, writes):
    """torch is that of the machine; modules are compiled at once where Python writes none later."""
    monkeypatch.setattr(sys, "dont_write_bytecode", not writes)
    later = [] if writes else ["--compile-bytecode"]
    assert install.uv_options({"timeout": "60"})[2:] == ["--torch-backend", "auto", *later]


@pytest.mark.parametrize(
    ("works", "expected"),
    [
        (lambda words: True, ["pip", "uv"]),
        (lambda words: "uv" not in words, ["pip", "pip"]),  # pip cannot get uv
        (lambda words: words[2] != "uv", ["pip", "uv", "pip"]),  # uv fails
    ],
)
def test_pip_installs_where_uv_cannot(monkeypatch, works, expected):
    called: list[tuple[str, ...]] = []
    monkeypatch.setattr(install, "run", lambda *words: called.append(words) or works(words))
    monkeypatch.setattr(sys, "argv", ["install.py", "dev", "docs"])
    install.main()
    assert [words[2] for words in called] == expected
    assert called[-1][-1] == ".[dev,docs]" and "constraints.txt" in called[-1]


def test_failure_is_told(monkeypatch):
    monkeypatch.setattr(install, "run", lambda *words: False)
    monkeypatch.setattr(sys, "argv", ["install.py"])
    with pytest.raises(SystemExit) as end:
        install.main()
    assert end.value.code == 1
