"""What `fit`, `validate` and `stream` do before their imports, which take seconds."""

from functools import partial

from infini_train import preemption
from infini_train.commands import PROGRAM, load, uncollected
from infini_train.training import lightning_patches


def start(command: str, words: list[str]) -> int:
    """Run a command of training and return its exit code."""
    if command == "validate":
        preemption.leave_on_interrupt(f"{PROGRAM} {command}")
    else:
        preemption.listen()  # from here on, because a signal would end the process during the imports
    with uncollected():
        lightning_patches.import_torchmetrics()
    code: int = load("infini_train.cli:run")(command, words)
    return code


fit, validate, stream = partial(start, "fit"), partial(start, "validate"), partial(start, "stream")
