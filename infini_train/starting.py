"""What `fit`, `validate` and `stream` do before their imports, which take seconds."""

from infini_train import preemption
from infini_train.commands import load
from infini_train.training import lightning_patches


def fit(words: list[str]) -> int:
    """`infini-train fit`. Signals are handled from here on, because one would end the process during the imports."""
    preemption.listen()
    return _training("fit", words)


def stream(words: list[str]) -> int:
    """`infini-train stream`."""
    preemption.listen()
    return _training("stream", words)


def validate(words: list[str]) -> int:
    """`infini-train validate`."""
    return _training("validate", words)


def _training(command: str, words: list[str]) -> int:
    lightning_patches.import_torchmetrics()
    code: int = load("infini_train.cli:run")(command, words)
    return code
