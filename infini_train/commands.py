"""The commands of `infini-train`. Each imports its modules when it is called, so that help answers at once."""

import gc
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

from infini_train.errors import closest, reported

PROGRAM = "infini-train"


class Command(NamedTuple):
    """A line of help, and the function that is called with the words after the command: `module:function`."""

    summary: str
    function: str


COMMANDS = {
    "fit": Command("train a model on tokenized shards", "infini_train.starting:fit"),
    "validate": Command("compute the validation loss of a run's checkpoint", "infini_train.starting:validate"),
    "stream": Command("train on webdatasets of raw text, tokenized on the fly", "infini_train.starting:stream"),
    "export": Command("write a checkpoint as a Hugging Face model", "infini_train.hf.commands:run_export"),
    "import": Command("convert a Llama-family model for training", "infini_train.hf.commands:run_import"),
    "serve": Command("serve an exported model through the OpenAI API", "infini_train.hf.serving:main"),
    "evaluate": Command("measure what a model remembers of long text", "infini_train.evaluation.__main__:main"),
    "plan": Command("estimate memory, traffic and time of a configuration", "infini_train.plan:main"),
    "inspect": Command("show the state of runs", "infini_train.inspection.__main__:main"),
    "report": Command(
        "write curves and evaluations of runs as an HTML page", "infini_train.inspection.__main__:report"
    ),
    "prep": Command("prepare datasets: tokenizer, shards, statistics", "data_prep.__main__:prep"),
    "submit": Command("submit a training run to SLURM", "launch.submit:main"),
    "preflight": Command("check every node and rank before training", "launch.preflight:main"),
}
EVALUATIONS = {
    "segments": Command(
        "loss by segment with the memory on, off, and exchanged for another document's",
        "infini_train.evaluation.commands:evaluate_segments",
    ),
    "recall": Command(
        "accuracy on answers that only the memory holds, by segment, with the memory on, off, and exchanged",
        "infini_train.evaluation.commands:evaluate_recall",
    ),
    "passkey": Command(
        "passkeys recalled, by length of the document and depth of the key in it",
        "infini_train.evaluation.commands:evaluate_passkey",
    ),
    "tasks": Command(
        "write task files for lm-evaluation-harness: documents, passkey, key-value recall",
        "data_prep.lm_eval_tasks:write_tasks",
    ),
}


@contextmanager
def uncollected() -> Iterator[None]:
    """Run the imports of the block without garbage collections, which find nothing and took 30% of the time.

    What was imported stays, so later collections need not look at it.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def load(function: str) -> Callable[..., Any]:
    """Import what `module:function` names."""
    module, name = function.split(":")
    with uncollected():
        loaded: Callable[..., Any] = getattr(import_module(module), name)
    return loaded


def with_underscores(words: Sequence[str]) -> list[str]:
    """Spell option names with underscores: `--data.micro-batch-size=2` becomes `--data.micro_batch_size=2`.

    Values, and everything after `--`, stay as they are.
    """
    end = words.index("--") if "--" in words else len(words)
    options = [re.sub(r"^--\w[\w.-]*\+?(?==|$)", lambda m: "--" + m[0][2:].replace("-", "_"), w) for w in words[:end]]
    return [*options, *words[end:]]


def usage() -> str:
    """The text of `infini-train --help`."""
    lines = [f"  {name:<{max(map(len, COMMANDS))}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [options]",
            "",
            "Pretraining of long-context language models with Infini-attention.",
            "",
            "commands:",
            *lines,
            "",
            f"`{PROGRAM} COMMAND --help` lists a command's options, and `{PROGRAM} --version` prints the version.",
            "A hyphen in an option's name is the same as an underscore.",
            "With INFINI_TRACEBACK=1 in the environment an error keeps its traceback.",
        ]
    )


def main() -> None:
    """Run the command that `sys.argv` names. Exit code 2 stands for an error that the user can correct."""
    name, *words = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        from importlib.metadata import version

        print(f"{PROGRAM} {version(PROGRAM)}")
    elif command := COMMANDS.get(name):
        code = reported(f"{PROGRAM} {name}", lambda: load(command.function)(with_underscores(words)))
        if code:
            sys.exit(code)
    else:
        found = f"unknown command {name}" if name else "no command given"
        advice = closest(name, COMMANDS) or f"; expected one of {', '.join(COMMANDS)}"
        print(f"{PROGRAM}: error: {found}{advice}", file=sys.stderr)
        sys.exit(2)
