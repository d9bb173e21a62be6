"""`infini-train` lists its commands, spells options in one way, reports errors in one form, and starts quickly."""

import subprocess
import sys

import pytest

from infini_train.commands import COMMANDS, EVALUATIONS, load, main, with_underscores

HEAVY = {"torch", "lightning", "transformers", "deepspeed", "datatrove", "pyarrow", "numpy", "yaml", "rich"}


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run a command and return its exit code."""
    monkeypatch.setattr("sys.argv", ["infini-train", *words])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_help_lists_every_command(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        assert [line.split(maxsplit=1) for line in lines].count([name, command.summary]) == 1


@pytest.mark.parametrize("command", [*COMMANDS.values(), *EVALUATIONS.values()], ids=lambda command: command.function)
def test_every_command_has_its_function(command):
    assert callable(load(command.function))


def test_version(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("infini-train ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vaildate"], "infini-train: error: unknown command vaildate; did you mean validate?"),
        ([], "infini-train: error: no command given; expected one of fit, validate, "),
        (["prep", "stats", "nowhere"], "infini-train prep stats: error: nowhere: found no directory"),
        (["inspect", "nowhere"], "infini-train inspect: error: nowhere: no such directory"),
        (["export", "nowhere", "out"], "infini-train export: error: nowhere: expected a complete checkpoint"),
        (["export", "nowhere"], "infini-train export: error: the following arguments are required: out"),
        (["import", "nowhere"], "infini-train import: error: "),
        (["serve", "nowhere"], "infini-train serve: error: nowhere: expected an exported model"),
        (["fit", "--data.row", "3"], "infini-train fit: error: unrecognized arguments: --data.row 3"),
        (["fit", "--run", "run"], "infini-train fit: error: option --data.train is required"),
        (
            ["prep"],
            "infini-train prep: error: the following arguments are required: COMMAND (`infini-train prep",
        ),
        (
            ["prep", "stats", "d", "--workerz", "3"],
            "infini-train prep stats: error: unrecognized arguments: --workerz 3; did you mean --workers?",
        ),
        (["evaluate", "recall", "m", "--dataset", "d", "e"], "infini-train evaluate recall: error: unrecognized"),
        (
            ["inspect", "run", "--jsno"],
            "infini-train inspect: error: unrecognized arguments: --jsno; did you mean --json?",
        ),
        (["stream", "--data.row", "3"], "infini-train stream: error: "),
        (["plan", "--config", "c", "--gpus-per-node=0"], "infini-train plan: error: gpus_per_node: found 0"),
        (
            ["submit", "--config", "c", "--nodes=0", "--gpus-per-node", "1"],
            "infini-train submit: error: nodes: found 0",
        ),
        (
            ["submit", "--config", "c", "--nodes=1", "--gpus-per-node", "1", "--data.train", "d"],
            "infini-train submit: error: unrecognized arguments: --data.train d; options of `infini-train fit` go",
        ),
        (["preflight", "--timeout", "x"], "infini-train preflight: error: argument --timeout: invalid float"),
    ],
)
def test_errors_have_one_form(monkeypatch, capsys, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert any(line.startswith(message) for line in error.splitlines()), error
    assert "Traceback" not in error


def test_options_are_spelled_with_underscores_or_hyphens():
    assert with_underscores(["--max-steps", "a-b", "--data.cache-gb=x-y=z", "-c", "--", "--max-steps", "a-b"]) == [
        *("--max_steps", "a-b", "--data.cache_gb=x-y=z", "-c", "--", "--max-steps", "a-b")
    ]
    assert with_underscores(["--trainer.callbacks+=a-b", "--two words-here", "-4", "--x-y+"]) == [
        *("--trainer.callbacks+=a-b", "--two words-here", "-4", "--x_y+")
    ]


@pytest.mark.parametrize("words", [["--help"], ["prep", "--help"], ["inspect", "--help"], ["evaluate", "--help"]])
def test_help_imports_nothing_heavy(words):
    program = f"import sys, infini_train.commands as c; sys.argv[1:] = {words}\n"
    program += "try: c.main()\nexcept SystemExit: pass\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "usage: infini-train" in done.stdout
    assert not HEAVY & set(done.stderr.split())
