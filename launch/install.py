"""Install infini-train into this interpreter's environment: python launch/install.py [EXTRA ...]

uv installs it, in a fraction of the time that pip takes; where pip cannot get uv, or uv fails, pip installs it. The
versions are those of constraints.txt either way. uv does not read pip's configuration, so its indexes are handed on.
"""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip"]
# Options of pip, which it also reads from its configuration, and the names that uv gives them.
OPTIONS = {
    "index-url": "--index-url",
    "extra-index-url": "--extra-index-url",
    "find-links": "--find-links",
    "trusted-host": "--allow-insecure-host",
    "cert": "--cert",
    "constraint": "--constraint",
}


def pip_configuration(listed: str) -> dict[str, str]:
    """Return the values of options from the output of `pip config list`, by the name of the option.

    Of a file's section for all commands, its section for `install`, and the environment, the latter counts.
    """
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        section, _, option = key.partition(".")
        if section in sections:
            sections[section][option] = str(ast.literal_eval(value))
    return {**sections["global"], **sections["install"], **sections[":env:"]}


def uv_options(configuration: dict[str, str]) -> list[str]:
    """Return the options of `uv pip install` that make it look where pip, so configured, would look."""
    words = ["--index-strategy", "unsafe-best-match"]  # pip compares all indexes; uv alone would stop at the first
    for option, name in OPTIONS.items():
        for value in configuration.get(option, "").split():
            words += [name, value]
    if "no-index" in configuration:
        words.append("--no-index")
    if not {"index-url", "extra-index-url", "find-links", "no-index"} & configuration.keys():
        words += ["--torch-backend", "auto"]  # PyPI's torch is a CUDA build of several GB, also where no GPU is
    if sys.dont_write_bytecode:
        words.append("--compile-bytecode")  # what is not compiled now would be compiled at every start
    return words


def run(*words: str) -> bool:
    """Run a command, and return whether it succeeded."""
    return subprocess.run(words, cwd=ROOT).returncode == 0


def main() -> None:
    extras = sys.argv[1:]
    package = f".[{','.join(extras)}]" if extras else "."
    what = ["--constraint", "constraints.txt", "--editable", package]
    print(f"Installing infini-train{package[1:]} and what it needs into {sys.prefix}", flush=True)
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True).stdout
    if run(*PIP, "install", "--quiet", "--constraint", "constraints.txt", "uv"):
        uv = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable]
        if run(*uv, *uv_options(pip_configuration(listed)), *what):
            return
    print("uv cannot install it; pip does, which takes minutes", file=sys.stderr, flush=True)
    if not run(*PIP, "install", "--quiet", *what):
        sys.exit(1)


if __name__ == "__main__":
    main()
