"""Runs of the command line in processes that send themselves a signal at the n-th of many instants."""

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

CONTEXT = multiprocessing.get_context("forkserver")  # imports lightning once for all runs
CONTEXT.set_forkserver_preload(["infini_train.cli"])


class Result(NamedTuple):
    """Exit code, how many instants were passed, what was written to stderr."""

    code: int
    instants: int
    err: str


def fit(
    run: Path,
    dataset: Path,
    *extra: str,
    die_at: int | None = None,
    number: signal.Signals = signal.SIGKILL,
    within: str = "",
    command: str = "fit",
    timeout: float = 120,
) -> Result:
    """`infini-train fit` of a tiny model in a process of its own, which gets signal `number` at an instant.

    `within` counts only the instants before and after calls of the function of this name. `command` may be another
    command with the same options.
    """
    count = CONTEXT.Value("i", 0)
    with tempfile.NamedTemporaryFile("r") as err:
        words = [command, *arguments(run, dataset)[1:], *extra]
        process = CONTEXT.Process(target=_run, args=(words, die_at, number, within, count, err.name))
        process.start()
        process.join(timeout)
        assert process.exitcode is not None, "the run hangs"
        return Result(process.exitcode, count.value, err.read())


def arguments(run: Path, dataset: Path) -> list[str]:
    options: dict[str, Any] = {
        "run": run,
        "ckpt_path": "last",
        "data.train": dataset,
        "data.validation": dataset,
        "data.segment_length": 8,
        "data.segments_per_window": 4,
        "data.lanes": 4,
        "data.micro_batch_size": 2,
        "data.num_workers": 0,
        "model.vocab_size": 100,
        "model.hidden_size": 32,
        "model.intermediate_size": 48,
        "model.num_hidden_layers": 2,
        "model.num_attention_heads": 4,
        "model.num_key_value_heads": 2,
        "model.memory_dropout": 0.2,
        "model.optimizer.warmup_steps": 5,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.max_steps": 20,
        "trainer.accumulate_grad_batches": 2,
        "trainer.enable_progress_bar": "false",
        "trainer.log_every_n_steps": 1,
        "trainer.val_check_interval": 12,  # at every second checkpoint
        "checkpoint.every_n_steps": 3,
    }
    return ["fit", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def _run(arguments: list[str], die_at: int | None, number: signal.Signals, within: str, count: Any, err: str) -> None:
    sys.stderr = open(err, "w", buffering=1)  # noqa: SIM115 (open until the process ends)
    import torch

    from infini_train import commands, preemption

    torch.set_num_threads(1)

    def instant() -> None:
        count.value += 1
        if count.value == die_at:
            os.kill(os.getpid(), number)

    watch_calls(instant, within)
    sys.argv = ["infini-train", *arguments]
    preemption.listen()
    commands.main()


def watch_calls(instant: Callable[[], None], within: str = "") -> None:
    """Call `instant` before and after every call of a function of training or saving, or of those named `within`."""
    import torch

    from infini_train.training import checkpoint, checkpoint_directory, checkpoint_format, module

    def watch(owner: Any, name: str) -> None:
        if within not in ("", name):
            return
        right: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            instant()
            result = right(*args, **kwargs)
            instant()
            return result

        setattr(owner, name, watched)

    watch(module.InfiniModule, "training_step")
    watch(module.InfiniModule, "validation_step")
    watch(torch.optim.AdamW, "step")
    watch(torch, "save")
    watch(checkpoint_format, "save_file")
    watch(checkpoint.Checkpointer, "save")
    for name in ("commit", "retain", "remove"):
        watch(checkpoint_directory.CheckpointDirectory, name)
    for name in ("fsync", "rename", "replace"):
        watch(os, name)
