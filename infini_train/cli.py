"""The command line: LightningCLI over InfiniModule and LaneDataModule, and commands beside it."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jsonargparse
import yaml
from huggingface_hub.errors import StrictDataclassError
from lightning import Callback, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from transformers.utils import logging as transformers_logging

from infini_train import preemption
from infini_train.data.datamodule import LaneDataModule
from infini_train.data.index import atomic_file
from infini_train.data.mixture import load_training_data, name_of, parts_of
from infini_train.data.streaming import StreamingDataModule
from infini_train.model.flops import parameters
from infini_train.training.allocator import keep_freed_blocks
from infini_train.training.callbacks import (
    FIRST_ERROR,
    Faults,
    MemoryHealth,
    NonFiniteError,
    NonFiniteGuard,
    ProgressLines,
    Recall,
    RunProgressBar,
    Throughput,
    exit_code,
)
from infini_train.training.checkpoint import (
    CONFIG,
    CURSOR,
    METRICS,
    Checkpointer,
    DirectoryIO,
    check,
    latest,
    read_model,
    step_of,
)
from infini_train.training.module import InfiniModule, architecture
from infini_train.training.run_lock import lock

# Lightning's advertisement, and warnings that do not hold here: the loader resumes exactly, by cursor, and what is
# logged is summed over ranks already.
for pattern in (
    ".*torch.distributed.* is deprecated.*",  # DeepSpeed's calls
    ".*sync_dist=True.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*overridden `transfer_batch_to_device`.*",
    ".*is not resumable.*",
):
    warnings.filterwarnings("ignore", pattern)
warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # no validation data
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())

# What a user can mend, reported in one line; anything else is our fault and keeps its traceback.
USER_ERRORS = (ValueError, OSError, MisconfigurationException, NonFiniteError, StrictDataclassError)


class TrainingCLI(LightningCLI):
    """One config file describes a run; the run's directory holds its resolved config, logs and checkpoints."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", type=str, default="runs/default", help="Directory of the run.")
        parser.add_argument(
            "--hang_timeout",
            type=float,
            default=1800.0,
            help="Seconds without a finished micro-batch after which a rank ends the job.",
        )
        parser.add_argument(
            "--nonfinite",
            type=Literal["stop", "skip"],
            default="stop",
            help="What to do with a step whose loss or gradient is not finite.",
        )
        parser.add_class_arguments(Checkpointer, "checkpoint", skip={"directory"}, instantiate=False)
        parser.link_arguments("data.segment_length", "model.segment_length")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        data = {"dataloaders", "train_dataloaders", "val_dataloaders", "datamodule"}
        skip = {"model", "weights_only", *data}
        return {"fit": skip, "validate": skip}

    def instantiate_trainer(self, **kwargs) -> Trainer:
        options = self.config[self.subcommand]
        run, path = Path(options.run), options.ckpt_path
        if path == "last" or (path is None and self.subcommand == "validate"):
            path = latest(run / "checkpoints")
            if path is None and self.subcommand == "validate":
                raise FileNotFoundError(f"{run / 'checkpoints'}: found no checkpoint to validate")
        self.config_init[self.subcommand].ckpt_path = None if path is None else str(path)
        loggers: list[Logger] = []
        trainer_options = self.config_init[self.subcommand].trainer
        callbacks: list[Callback] = [Faults(run, options.hang_timeout, USER_ERRORS), Recall()]
        progress = trainer_options.enable_progress_bar is not False
        bar = progress and sys.stdout.isatty()
        if bar:
            callbacks.append(RunProgressBar())
        step = 0
        if path is not None:
            check(Path(path), self.model.config)
            step = step_of(Path(path))
            self.model.starts_fresh = False
        if self.subcommand == "fit":
            if path is None and latest(run / "checkpoints"):
                raise FileExistsError(
                    f"{run}: has checkpoints; --ckpt_path last resumes them, --run names another run"
                )
            # What a cut-off run logged after its checkpoint is logged again: drop the old points.
            board = TensorBoardLogger(run, name="", version="tensorboard", purge_step=step + 1, flush_secs=10)
            loggers.append(board)
            if progress and not bar:
                loggers.append(ProgressLines(trainer_options.max_steps))
            guard = NonFiniteGuard(run, options.nonfinite)
            saver = Checkpointer(run / "checkpoints", **options.checkpoint.as_dict())
            callbacks += [guard, MemoryHealth(guard), Throughput(), saver]
        given = trainer_options.callbacks or []
        callbacks += given if isinstance(given, list) else [given]
        # Lightning's own requeueing saves inside the signal handler, and deadlocks.
        slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
        trainer = super().instantiate_trainer(
            logger=loggers,
            callbacks=callbacks,
            plugins=[DirectoryIO(), *slurm],
            default_root_dir=run,
            enable_progress_bar=bar,
            **kwargs,
        )
        preemption.replace_lightning(trainer)
        if trainer.strategy.root_device.type == "cpu":
            keep_freed_blocks()
        return trainer

    def before_validate(self) -> None:
        if self.trainer.is_global_zero:
            self._begin(Path(self.config.validate.run))

    def _begin(self, run: Path) -> None:
        (run / FIRST_ERROR).unlink(missing_ok=True)
        if path := self.config_init[self.subcommand].ckpt_path:
            print(f"infini-train: {self.subcommand} from {path}, step {step_of(Path(path))}", flush=True)

    def before_fit(self) -> None:
        if self.trainer.is_global_zero:
            run = Path(self.config.fit.run)
            run.mkdir(parents=True, exist_ok=True)
            self.lock = lock(run)  # as long as this object lives
            self._begin(run)
            self.config.fit.model.update(jsonargparse.Namespace(architecture(self.model.config)))
            config = self._parser("fit").dump(self.config.fit, skip_unset=False, skip_link_targets=False)
            with atomic_file(run / CONFIG) as file:
                file.write(config.encode())


def export(checkpoint: Path, out: Path, dataset: Path | None = None, max_shard_size: str = "5GB") -> None:
    """Write a checkpoint as a Hugging Face model directory.

    Args:
        checkpoint: a checkpoint directory, or a run's `checkpoints` for its latest.
        out: directory to write; must not exist.
        dataset: directory of shards whose tokenizer to include; none: the run's training data.
        max_shard_size: of one safetensors file.
    """
    from infini_train.hf.card import Training, model_card
    from infini_train.hf.export import write_model
    from infini_train.hf.tokenizer import write_tokenizer

    path = latest(checkpoint) or checkpoint
    check(path)
    config, weights = read_model(path)
    options = yaml.safe_load((path / CONFIG).read_text())
    trained_on = options["data"].get("train") or [{"path": options["data"]["urls"]}]  # of `infini-train stream`
    if not dataset and "train" not in options["data"]:
        raise ValueError(f"{path}: trained on a stream of texts; --dataset must name shards with its tokenizer")
    given = str(dataset) if dataset else trained_on
    index = load_training_data(given)
    index.check_files()
    if index.vocab_size > config.vocab_size:
        raise ValueError(
            f"{index.root}: tokenizer of {index.vocab_size} tokens, expected at most the model's {config.vocab_size}"
        )
    config.bos_token_id, config.eos_token_id = index.bos_id, index.eos_id
    fingerprint = (json.loads((path / CURSOR).read_text()) or {}).get("fingerprint")
    trained_on_it = index.fingerprint == fingerprint
    pretrained = options["model"]["pretrained"]
    training = Training(
        data=", ".join(name_of(part.path) for part in parts_of(trained_on)),
        fingerprint=fingerprint,
        documents=index.documents if trained_on_it else None,
        tokens=index.total_tokens if trained_on_it else None,
        metrics=json.loads((path / METRICS).read_text()),
        pretrained=Path(pretrained).name if pretrained else None,
    )

    def add_files(directory: Path) -> None:
        write_tokenizer(
            index.root / index.tokenizer_file,
            directory,
            bos_id=index.bos_id,
            eos_id=index.eos_id,
            max_length=config.max_position_embeddings,
        )
        (directory / "README.md").write_text(model_card(out.name, config, training))

    write_model(config, weights, out, source=path, add_files=add_files, max_shard_size=max_shard_size)
    print(f"exported {path} to {out}")


def import_model(
    source: Path,
    out: Path,
    segment_length: int | None = None,
    memory: Literal["paper-linear", "paper-delta", "selective-delta"] | None = None,
    gate_init: float | None = None,
    gguf_file: str | None = None,
) -> None:
    """Write a Llama-family checkpoint as an Infini model directory, for `fit --model.pretrained` and transformers.

    Args:
        source: directory of a Hugging Face model (llama, mistral without a sliding window, infini) in safetensors,
            or a GGUF file, or a directory with one.
        out: directory to write; must not exist.
        segment_length: tokens of a segment, at most the positions the original knows; none: 2048, or the Infini
            model's own.
        memory: the memory rule; none: paper-linear, or the Infini model's own.
        gate_init: beta of every gate, whose sigmoid is the memory's share in each head. None: -4, a share of 0.018:
            with the paper's rules the first segment is the original's at any gate, but from the second on an
            untrained memory takes its share of the original's attention (selective-delta's takes it everywhere).
            Gates learn fast (optimizer.gate_lr). An Infini model keeps its gates.
        gguf_file: name of the file, where the directory holds several.
    """
    from infini_train.hf.llama import import_model as write

    config = write(source, out, segment_length, memory, gate_init, gguf_file)
    print(
        f"imported {source} to {out}: {parameters(config):,} parameters, segments of {config.segment_length} tokens"
    )


# Beside those of LightningCLI.
COMMANDS: dict[str, Callable[..., None]] = {"import": import_model, "export": export}


def train(
    cli: type[TrainingCLI] = TrainingCLI,
    args: list[str] | None = None,
    data: type[LaneDataModule | StreamingDataModule] = LaneDataModule,
) -> TrainingCLI:
    """Parse the command line (or `args`) and run its subcommand."""
    return cli(
        InfiniModule,
        data,
        args=args,
        save_config_callback=None,
        seed_everything_default=False,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs={
            "description": f"Also {', '.join(COMMANDS)}, plan, stream (fit on raw-text webdatasets), evaluate: "
            "infini-train evaluate --help"
        },
        trainer_defaults={
            "use_distributed_sampler": False,  # lanes are shared out by the data module
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,  # one endless epoch; val_check_interval counts micro-batches
            "val_check_interval": 1000,
            "max_epochs": -1,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 10,
            "precision": "32-true",
        },
    )


def main() -> None:
    """Run a command; a user's mistake ends in one message on stderr and exit code 2."""
    try:
        if sys.argv[1:2] == ["evaluate"]:
            from infini_train.evaluation.__main__ import main as evaluate

            sys.exit(evaluate(sys.argv[2:]))
        if sys.argv[1:2] == ["stream"]:
            train(args=["fit", *sys.argv[2:]], data=StreamingDataModule)
        elif sys.argv[1:2] == ["plan"]:
            from infini_train.plan import plan

            parser = jsonargparse.ArgumentParser(prog="infini-train plan")
            parser.add_function_arguments(plan)
            plan(**parser.parse_args(sys.argv[2:]))
        elif sys.argv[1:] and (command := COMMANDS.get(sys.argv[1])):
            transformers_logging.set_verbosity_error()
            transformers_logging.disable_progress_bar()
            jsonargparse.auto_cli(command, args=sys.argv[2:], prog=f"infini-train {sys.argv[1]}")
        else:
            train()
    except USER_ERRORS as error:
        if os.environ.get("INFINI_TRACEBACK"):
            raise
        print(f"infini-train: error: {error}\n(INFINI_TRACEBACK=1 shows where)", file=sys.stderr)
        sys.exit(exit_code(error, USER_ERRORS))
