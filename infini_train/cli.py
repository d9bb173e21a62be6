"""`infini-train fit`, `validate` and `stream`: LightningCLI with InfiniModule and a data module."""

import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml
from huggingface_hub.errors import StrictDataclassError
from lightning import Callback, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from infini_train.commands import PROGRAM, with_underscores
from infini_train.data.datamodule import LaneDataModule
from infini_train.data.streaming import StreamingDataModule
from infini_train.errors import reported
from infini_train.files import write_file
from infini_train.parsing import Parser, foreign_classes
from infini_train.run_files import CHECKPOINTS, CONFIG, FIRST_ERROR, VALIDATION_ERROR, latest, step_of
from infini_train.training import lightning_patches, loggers
from infini_train.training.architecture import architecture
from infini_train.training.beginning import checkpoint_to_begin_from, checkpoint_to_validate, record_beginning
from infini_train.training.callbacks.faults import Faults
from infini_train.training.callbacks.memory_metrics import MemoryMetrics
from infini_train.training.callbacks.progress import ModelSize, ProgressLines, RunProgressBar
from infini_train.training.callbacks.recall import Recall
from infini_train.training.callbacks.samples import Samples
from infini_train.training.callbacks.step_guard import NonFiniteError, SkippedStepsError, StepGuard
from infini_train.training.callbacks.throughput import Throughput
from infini_train.training.callbacks.train_metrics import TrainMetrics
from infini_train.training.checkpoint import Checkpointer
from infini_train.training.checkpoint_format import check
from infini_train.training.checkpoint_io import DirectoryIO, Verifier
from infini_train.training.module import InfiniModule
from infini_train.training.run_lock import lock
from infini_train.training.trainer_options import unusable_callbacks, unusable_options, unusable_strategy

LOADER = "omegaconf"  # of configuration files: ${oc.env:NAME} stands for an environment variable
# Errors that a user can correct. Any other error is a fault of this program, and keeps its traceback.
USER_ERRORS = (
    ValueError,
    OSError,
    MisconfigurationException,
    NonFiniteError,
    SkippedStepsError,
    StrictDataclassError,
)


lightning_patches.silence()
lightning_patches.stop_between_steps()
lightning_patches.start_a_finished_run()


class TrainingParser(Parser, LightningArgumentParser):
    """Lightning's parser, which reports errors as all commands do and knows environment variables in files."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"parser_mode": LOADER, **options})


class TrainingCLI(LightningCLI):
    """One config file describes a run. The run's directory holds its resolved config, logs and checkpoints."""

    def __init__(self, *classes: Any, args: list[str], command: str, **options: Any):
        # Only the parser of the subcommand that is called, because each of them takes 0.2 s to build.
        self.called = [name for name in ("fit", "validate") if name in args[:1]] or ["fit", "validate"]
        self.command = command
        self.changes: list[str] = []  # what a resumed run does differently from its checkpoint
        super().__init__(*classes, args=args, **options)  # type: ignore[misc]  # classes are the first two

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", type=str, default="runs/default", help="Directory of the run.")
        parser.add_argument(
            "--hang_timeout",
            type=float,
            default=1800.0,
            help="Seconds without a finished micro-batch after which a rank ends the job.",
        )
        parser.add_argument(
            "--sample_every",
            type=int | None,
            default=None,
            help="Print how the model continues a document after every so many steps; null: never.",
        )
        parser.add_argument(
            "--nonfinite",
            type=Literal["stop", "skip"],
            default="stop",
            help="What to do with a step whose loss or gradient is not finite.",
        )
        parser.add_argument(
            "--spike_threshold",
            type=float | None,
            default=None,
            help="Skip a step whose loss is more than this many standard deviations above the mean of the last ones; "
            "null: skip none.",
        )
        parser.add_argument("--spike_window", type=int, default=128, help="Number of last steps in this mean.")
        parser.add_argument(
            "--max_skips", type=int, default=10, help="End the run when so many steps in a row were skipped."
        )
        parser.add_argument(
            "--restore",
            type=Literal["all", "weights", "optimizer", "ema"],
            default="all",
            help="What a new run takes from --ckpt_path: `all` goes on exactly; `weights` begins at step 0 with a "
            "new optimizer and empty memories, on any data, with any lanes, windows and segments; `optimizer` takes "
            "the weights and the optimizer's state, and is else the same; `ema` takes the moving average of the "
            "weights (model.optimizer.ema_decay) alone. A run that is resumed restores all of its own checkpoints.",
        )
        if self.called == ["validate"]:  # no option of `fit`, whose configuration `validate` can take
            parser.add_argument(
                "--weights",
                type=Literal["trained", "ema"],
                default="trained",
                help="Validate the weights that were trained, or their moving average (model.optimizer.ema_decay).",
            )
        parser.add_class_arguments(Checkpointer, "checkpoint", skip={"directory", "throughput"}, instantiate=False)
        parser.link_arguments("data.segment_length", "model.segment_length")

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The subcommands, and for each the parameters of Trainer's method that are no options."""
        data = {"dataloaders", "train_dataloaders", "val_dataloaders", "datamodule"}
        return {name: {"model", "weights_only", *data} for name in self.called}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for name, subparser in self._subcommand_parsers.items():
            subparser.prog = f"{PROGRAM} {self.command or name}"

    def _parse_ckpt_path(self) -> None:
        """Do not load hyperparameters from the checkpoint, as Lightning does if the option names a file."""

    def before_instantiate_classes(self) -> None:
        options = self.config[self.subcommand]
        if wrong := unusable_options(options.seed_everything, vars(options.trainer)):
            raise ValueError("\n".join(wrong))
        for name in sorted(foreign_classes(options)):
            line = f"infini-train: the configuration names {name}, which was imported"
            rank_zero_only(print)(line, file=sys.stderr, flush=True)

    def instantiate_classes(self) -> None:
        options = self.config[self.subcommand]
        given = options.trainer.logger
        options.trainer.logger = loggers.continued(given, Path(options.run))
        super().instantiate_classes()
        options.trainer.logger = given  # the run's configuration keeps what was given, so that another run can use it

    def instantiate_trainer(self, **kwargs) -> Trainer:
        options = self.config[self.subcommand]
        run = Path(options.run)
        path: Path | None
        if self.subcommand == "validate":
            path = checkpoint_to_validate(run, options.ckpt_path)
            self.restored = "ema" if options.weights == "ema" else "all"
        else:
            path, self.restored = checkpoint_to_begin_from(run, options.ckpt_path, options.restore)
        self.begins_from, weights_only = path, self.restored != "all"
        self.config_init[self.subcommand].ckpt_path = None if path is None or weights_only else str(path)
        boards: list[Logger] = []
        trainer_options = self.config_init[self.subcommand].trainer
        callbacks: list[Callback] = [Faults(self._first_error(run), options.hang_timeout, USER_ERRORS), Recall()]
        progress = trainer_options.enable_progress_bar is not False
        bar = progress and sys.stdout.isatty()
        if bar:
            callbacks.append(RunProgressBar())
        step = 0
        if path is not None:
            check(path, self.model.config, weights_only=weights_only and self.subcommand == "fit")
            callbacks.append(Verifier(path))
            if weights_only:
                self.model.weights_of, self.model.average_of_weights = path, self.restored == "ema"
                if self.restored == "optimizer":
                    self.changes = self.model.take_optimizer(path)
            else:
                step = step_of(path)
                self.model.starts_fresh = False
                if self.subcommand == "fit":
                    self.changes = self.model.prepare_to_resume(path)
        if self.subcommand == "fit":
            # Steps after the checkpoint are repeated and logged again, so their old points are dropped.
            if trainer_options.logger is not False:
                board = loggers.RunBoard(run, name="", version="tensorboard", purge_step=step + 1, flush_secs=10)
                boards.append(board)
            boards += as_list(trainer_options.logger)
            if progress and not bar:
                boards.append(ProgressLines(trainer_options.max_steps))
            if trainer_options.enable_model_summary is not False:
                callbacks.append(ModelSize())
            names = ("nonfinite", "spike_threshold", "spike_window", "max_skips")
            guard = StepGuard(run, **{name: options[name] for name in names})
            throughput = Throughput()
            saver = Checkpointer(run / CHECKPOINTS, throughput, **options.checkpoint.as_dict())
            callbacks += [guard, TrainMetrics(guard), MemoryMetrics(), throughput, saver]
            if options.sample_every is not None:
                callbacks.append(Samples(options.sample_every, throughput))
        given = as_list(trainer_options.callbacks)
        if wrong := unusable_callbacks(given):
            raise ValueError("\n".join(wrong))
        callbacks += given
        # Lightning's own requeueing saves the checkpoint inside the signal handler, which deadlocks.
        slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
        try:
            trainer = super().instantiate_trainer(
                logger=boards,
                callbacks=callbacks,
                plugins=[DirectoryIO(), *slurm, *as_list(trainer_options.plugins)],
                default_root_dir=run,
                enable_progress_bar=bar,
                enable_model_summary=False,  # of Lightning
                **kwargs,
            )
        except (TypeError, ModuleNotFoundError) as error:  # as for devices: -1 on a CPU
            raise ValueError(f"trainer: {error}") from error
        if refused := unusable_strategy(trainer_options.strategy, trainer.strategy):
            raise ValueError(refused)
        lightning_patches.replace_signal_handling(trainer)
        lightning_patches.keep_gradient_buckets(trainer)
        return trainer

    def before_validate(self) -> None:
        if self.trainer.is_global_zero:
            with suppress(OSError):  # the run may be read-only
                self._begin(Path(self.config.validate.run))

    def _begin(self, run: Path) -> None:
        if path := self.begins_from:
            fits = self.subcommand == "fit"
            doing = ("continuing from" if self.restored == "all" else "starting from") if fits else "validating"
            of = {
                "all": "",
                "weights": "the weights of ",
                "optimizer": "the weights and the optimizer's state of ",
                "ema": "the averaged weights of ",
            }
            print(f"infini-train: {doing} {of[self.restored]}{path}, step {step_of(path)}", flush=True)
            for change in self.changes:
                print(f"infini-train: {change}", flush=True)
        self._first_error(run).unlink(missing_ok=True)

    def _first_error(self, run: Path) -> Path:
        return run / (FIRST_ERROR if self.subcommand == "fit" else VALIDATION_ERROR)

    def before_fit(self) -> None:
        if self.trainer.is_global_zero:
            run = Path(self.config.fit.run)
            run.mkdir(parents=True, exist_ok=True)
            self.lock = lock(run)  # held as long as this object exists
            self._begin(run)
            record_beginning(run, self.begins_from, self.restored)
            steps = 0 if self.begins_from is None or self.restored != "all" else step_of(self.begins_from)
            if steps >= self.trainer.max_steps > 0:
                print(
                    f"infini-train: no step is left: {self.begins_from} has done {steps} of {self.trainer.max_steps} "
                    "steps (trainer.max_steps)",
                    file=sys.stderr,
                    flush=True,
                )
            self.config.fit.model.update(jsonargparse.Namespace(architecture(self.model.config)))
            config = self._parser("fit").dump(self.config.fit, skip_unset=False, skip_link_targets=False)
            write_file(run / CONFIG, config.encode())
            given = as_list(self.config_init.fit.trainer.logger)
            path = self.config_init.fit.ckpt_path
            loggers.start(given, run, step_of(Path(path)) if path else 0)
            # Once, because MLflow refuses to change what it was told.
            if self.config.fit.trainer.enable_autolog_hparams and not path:
                for logger in given:
                    logger.log_hyperparams(yaml.safe_load(config))

    def after_fit(self) -> None:
        steps, wanted = self.trainer.global_step, self.trainer.max_steps
        if self.trainer.is_global_zero and steps < wanted:
            saved = latest(Path(self.config.fit.run) / CHECKPOINTS) or "no step yet"
            print(
                f"infini-train: ended after {steps} of {wanted} steps, because trainer.max_time is over or a "
                f"callback stopped the run; saved up to {saved}",
                file=sys.stderr,
                flush=True,
            )


def as_list(given: Any) -> list[Any]:
    """Return what an option holds that takes one object, several or a boolean."""
    if given is None or isinstance(given, bool):
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def train(
    cli: type[TrainingCLI] = TrainingCLI,
    args: Sequence[str] | None = None,
    data: type[LaneDataModule | StreamingDataModule] = LaneDataModule,
    command: str = "",
) -> TrainingCLI:
    """Parse the arguments of `fit` or `validate` and run it.

    Args:
        cli: class that runs the subcommand, or does less with its options.
        args: `fit` or `validate`, and its options; None stands for the words of the command line.
        data: class that serves the batches.
        command: the command as messages name it; by default the first of `args`.

    Returns:
        The instance of `cli`, with all that it has parsed and made.
    """
    args = with_underscores(sys.argv[1:] if args is None else args)
    # Lightning warns of arguments that come from the program while the command line has some, as here.
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")
    return cli(
        InfiniModule,
        data,
        args=args,
        command=command,
        save_config_callback=None,
        seed_everything_default=False,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_class=TrainingParser,
        parser_kwargs={"prog": PROGRAM},
        trainer_defaults={
            "use_distributed_sampler": False,  # the data module shares out the lanes itself
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,  # training is one endless epoch; val_check_interval counts micro-batches
            "val_check_interval": 1000,
            "max_epochs": -1,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 10,
            "precision": "32-true",
        },
    )


def run(command: str, words: list[str]) -> int:
    """Run `fit`, `validate` or `stream` with its options, and return the exit code."""

    def call() -> None:
        if command == "stream":
            train(args=["fit", *words], data=StreamingDataModule, command=command)
        else:
            train(args=[command, *words])

    return reported(f"{PROGRAM} {command}", call, expected=USER_ERRORS)
