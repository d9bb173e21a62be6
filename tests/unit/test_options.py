"""Every option of `fit` reaches what it is about, or is refused with a reason."""

import math
from collections.abc import Callable
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ModelSummary, Timer
from lightning.pytorch.loggers import CSVLogger

from infini_train.cli import TrainingCLI, train
from infini_train.data.datamodule import trainer_faults
from infini_train.training.callbacks.faults import Faults
from infini_train.training.callbacks.progress import ProgressLines
from infini_train.training.callbacks.samples import Samples
from infini_train.training.callbacks.step_guard import StepGuard
from infini_train.training.checkpoint import Checkpointer
from infini_train.training.optim import OptimizerOptions

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")


class Made(TrainingCLI):
    """Makes trainer, model and data from the options, and stops there."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def made(*words: str) -> TrainingCLI:
    return train(Made, ["fit", *words])


def named(cli: TrainingCLI) -> set[str]:
    """Names of all options in the parser's own list."""
    parser = cli._parser("fit")
    names = {action.dest for action in parser._actions if not action.dest.endswith(("help", "config"))}
    options = {f"model.optimizer.{f.name}" for f in fields(OptimizerOptions) if f.init}
    return names - {"trainer", "model", "data", "checkpoint", "model.optimizer"} | options


def one(cli: TrainingCLI, kind: type) -> Any:
    (found,) = (c for c in [*cli.trainer.callbacks, *cli.trainer.loggers] if isinstance(c, kind))
    return found


def attribute(path: str) -> Callable[[TrainingCLI], Any]:
    """The attribute of the command that the dotted path names."""

    def read(found: Any) -> Any:
        for name in path.split("."):
            found = getattr(found, name)
        return found

    return read


# Option -> what is given, where it arrives, and what must be found there (None: what is given).
USED: dict[str, tuple[Any, str | Callable[[TrainingCLI], Any], Any]] = {
    "trainer.accelerator": ("cpu", lambda c: type(c.trainer.accelerator).__name__, "CPUAccelerator"),
    "trainer.strategy": ("ddp", lambda c: type(c.trainer.strategy).__name__, "DDPStrategy"),
    "trainer.devices": (2, "trainer.num_devices", None),
    "trainer.num_nodes": (3, "trainer.num_nodes", None),
    "trainer.precision": ("bf16-mixed", "trainer.precision", None),
    "trainer.logger": (
        {"class_path": "CSVLogger", "init_args": {"save_dir": "logs", "version": "a"}},
        lambda c: one(c, CSVLogger).log_dir,
        "logs/lightning_logs/a",
    ),
    "trainer.callbacks": (
        [{"class_path": "LearningRateMonitor", "init_args": {"logging_interval": "step"}}],
        lambda c: one(c, LearningRateMonitor).logging_interval,
        "step",
    ),
    "trainer.max_steps": (7, "trainer.max_steps", None),
    "trainer.min_steps": (3, "trainer.min_steps", None),
    "trainer.max_time": ("00:01:00:00", lambda c: one(c, Timer)._duration, timedelta(hours=1).total_seconds()),
    "trainer.limit_train_batches": (
        5,
        lambda c: any("trainer.limit_train_batches: found 5" in line for line in trainer_faults(c.trainer, 24, 2)),
        True,
    ),
    "trainer.limit_val_batches": (4, "trainer.limit_val_batches", None),
    "trainer.val_check_interval": (6, "trainer.val_check_interval", None),
    "trainer.num_sanity_val_steps": (2, "trainer.num_sanity_val_steps", None),
    "trainer.log_every_n_steps": (11, "trainer.log_every_n_steps", None),
    "trainer.enable_progress_bar": (
        False,
        lambda c: [logger for logger in c.trainer.loggers if isinstance(logger, ProgressLines)],
        [],
    ),
    "trainer.enable_model_summary": (
        False,
        lambda c: [callback for callback in c.trainer.callbacks if isinstance(callback, ModelSummary)],
        [],
    ),
    "trainer.enable_autolog_hparams": (False, "config.fit.trainer.enable_autolog_hparams", None),
    "trainer.accumulate_grad_batches": (2, "trainer.accumulate_grad_batches", None),
    "trainer.gradient_clip_val": (0.5, "trainer.gradient_clip_val", None),
    "trainer.gradient_clip_algorithm": ("value", "trainer.gradient_clip_algorithm", None),
    "trainer.deterministic": (
        "warn",
        lambda c: torch.is_deterministic_algorithms_warn_only_enabled(),
        True,
    ),
    "trainer.benchmark": (True, lambda c: torch.backends.cudnn.benchmark, None),
    "trainer.inference_mode": (False, "trainer.validate_loop.inference_mode", None),
    "trainer.profiler": ("simple", lambda c: type(c.trainer.profiler).__name__, "SimpleProfiler"),
    "trainer.detect_anomaly": (True, "trainer._detect_anomaly", None),
    "trainer.plugins": (
        [{"class_path": "LightningEnvironment"}],
        lambda c: c.trainer.strategy.cluster_environment is c.config_init.fit.trainer.plugins[0],
        True,
    ),
    "model.pretrained": (None, "model.pretrained", None),
    "model.segment_length": (None, "model.config.segment_length", 32),  # from data.segment_length
    "model.activation_checkpointing": (True, "model.activation_checkpointing", None),
    "model.segments_per_chunk": (2, "model.segments_per_chunk", None),
    "model.compile": (True, "model.compiled", None),
    "model.memory_dropout": (0.25, "model.memory_dropout", None),
    "model.window_dropout": (0.25, "model.window_dropout", None),
    "model.write_cost": (0.5, "model.write_cost", None),
    "model.write_cost_from": (9, "model.write_cost_from", None),
    "model.seed": (13, "model.seed", None),
    "model.vocab_size": (300, "model.config.vocab_size", None),
    "model.hidden_size": (96, "model.config.hidden_size", None),
    "model.intermediate_size": (80, "model.config.intermediate_size", None),
    "model.num_hidden_layers": (3, "model.config.num_hidden_layers", None),
    "model.num_attention_heads": (6, "model.config.num_attention_heads", None),
    "model.num_key_value_heads": (3, "model.config.num_key_value_heads", None),
    "model.head_dim": (20, "model.config.head_dim", None),
    "model.memory": ("paper-delta", "model.config.memory", None),
    "model.sliding_window": (48, "model.config.sliding_window", None),
    "model.output_memory_dim": (7, "model.config.output_memory_dim", None),
    "model.memory_base": (False, "model.config.memory_base", None),
    "model.attention_bias": (True, "model.config.attention_bias", None),
    "model.qk_norm": (True, "model.config.qk_norm", None),
    "model.gate_init": (-2.0, "model.config.gate_init", None),
    "model.rope_theta": (5000.0, lambda c: c.model.config.rope_parameters["rope_theta"], None),
    "model.rms_norm_eps": (1e-4, "model.config.rms_norm_eps", None),
    "model.initializer_range": (0.03, "model.config.initializer_range", None),
    "model.embedding_range": (None, "model.config.embedding_range", None),  # not together with tied embeddings
    "model.tie_word_embeddings": (True, "model.config.tie_word_embeddings", None),
    "model.optimizer.name": ("sgd", "model.options.name", None),
    "model.optimizer.lr": (0.002, "model.options.lr", None),
    "model.optimizer.gate_lr": (0.003, "model.options.gate_lr", None),
    "model.optimizer.muon_lr": (None, "model.options.muon_lr", None),  # only with name: muon
    "model.optimizer.weight_decay": (0.2, "model.options.weight_decay", None),
    "model.optimizer.betas": ([0.8, 0.9], "model.options.betas", (0.8, 0.9)),
    "model.optimizer.eps": (1e-6, "model.options.eps", None),
    "model.optimizer.schedule": ("wsd", "model.options.schedule", None),
    "model.optimizer.warmup_steps": (17, "model.options.warmup_steps", None),
    "model.optimizer.decay_steps": (19, "model.options.decay_steps", None),
    "model.optimizer.final_lr": (0.4, "model.options.final_lr", None),
    "model.optimizer.ema_decay": (0.99, "model.options.ema_decay", None),
    "data.train": ("shards", lambda c: c.datamodule.given["train"], None),
    "data.validation": ("held-out", lambda c: c.datamodule.given["validation"], None),
    "data.segment_length": (32, "datamodule.segment_length", None),
    "data.segments_per_window": (5, "datamodule.segments_per_window", None),
    "data.lanes": (24, "datamodule.lanes", None),
    "data.micro_batch_size": (2, "datamodule.micro_batch_size", None),
    "data.seed": (21, "datamodule.seed", None),
    "data.num_workers": (1, "datamodule.num_workers", None),
    "data.limit_validation_tokens_per_document": (99, "datamodule.limit_validation_tokens_per_document", None),
    "data.context_parallel": (1, "datamodule.context_parallel", None),
    "data.cache": ("blocks", lambda c: c.datamodule.load.keywords["cache"], Path("blocks")),
    "data.cache_gb": (0.5, lambda c: c.datamodule.load.keywords["cache_bytes"], 2**29),
    "data.allow_growth": (True, "datamodule.allow_growth", None),
    "run": ("a-run", lambda c: one(c, Checkpointer).directory.path, Path("a-run/checkpoints")),
    "hang_timeout": (77.0, lambda c: one(c, Faults).hang_timeout, None),
    "sample_every": (5, lambda c: one(c, Samples).every, None),
    "nonfinite": ("skip", lambda c: one(c, StepGuard).nonfinite, None),
    "spike_threshold": (5.0, lambda c: one(c, StepGuard).spike_threshold, None),
    "spike_window": (60, lambda c: one(c, StepGuard).spike_window, None),
    "max_skips": (3, lambda c: one(c, StepGuard).max_skips, None),
    "checkpoint.every_n_steps": (8, lambda c: one(c, Checkpointer).every_n_steps, None),
    "checkpoint.keep_last": (4, lambda c: one(c, Checkpointer).directory.keep_last, None),
    "checkpoint.keep_every_n_steps": (16, lambda c: one(c, Checkpointer).directory.keep_every_n_steps, None),
    "checkpoint.keep_every_hours": (2.5, lambda c: one(c, Checkpointer).directory.keep_every_hours, None),
    "checkpoint.best": ("val/loss", lambda c: one(c, Checkpointer).best.metric, None),
    "checkpoint.best_mode": ("max", lambda c: one(c, Checkpointer).best.mode, None),
    "restore": ("all", "restored", None),  # tests/resume/test_branches.py has the other
    "ckpt_path": (None, lambda c: c.config_init.fit.ckpt_path, None),  # tests/unit/test_cli.py names one
}
REFUSED = {
    "seed_everything": 7,
    "trainer.fast_dev_run": True,
    "trainer.max_epochs": 2,
    "trainer.min_epochs": 1,
    "trainer.overfit_batches": 0.5,
    "trainer.limit_test_batches": 0.5,
    "trainer.limit_predict_batches": 0.5,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.enable_checkpointing": False,
    "trainer.use_distributed_sampler": True,
    "trainer.barebones": True,
    "trainer.sync_batchnorm": True,
    "trainer.reload_dataloaders_every_n_epochs": 1,
    "trainer.default_root_dir": "elsewhere",
    "trainer.model_registry": "a-model",
}


def config(options: dict[str, Any], path: Path) -> str:
    """Write options with dotted names as a configuration file."""
    tree: dict[str, Any] = {}
    for name, value in options.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.fixture
def unchanged(monkeypatch, tmp_path):
    """Trainer sets some options for the whole process."""
    monkeypatch.chdir(tmp_path)
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = benchmark
    torch.use_deterministic_algorithms(False)


def test_every_option_is_used_or_refused(unchanged, tmp_path):
    given = {name: value for name, (value, *_) in USED.items() if name != "model.segment_length"}
    cli = made("--config", config(given, tmp_path / "used.yaml"))
    assert named(cli) == USED.keys() | REFUSED.keys()
    for name, (value, where, expected) in USED.items():
        found = (attribute(where) if isinstance(where, str) else where)(cli)
        assert found == (value if expected is None else expected), name
    assert made("--data.train", "shards", "--model.embedding_range", "0.5").model.config.embedding_range == 0.5

    given = {"data.train": "shards", **REFUSED}
    with pytest.raises(ValueError, match="seed_everything") as refused:
        made("--config", config(given, tmp_path / "refused.yaml"))
    lines = str(refused.value).splitlines()
    assert [line.split(":")[0] for line in lines] == list(REFUSED)
    for line, value in zip(lines, REFUSED.values(), strict=True):
        assert f"found {value}, expected" in line


# Numbers of every option that has some, and that are out of its range.
WRONG: dict[str, list[Any]] = {
    "trainer.max_steps": [0, -1],
    "trainer.limit_train_batches": [-1, 0.5],
    "trainer.limit_val_batches": [-1, 1.5],
    "trainer.val_check_interval": [0, -1],
    "trainer.num_sanity_val_steps": [-2],
    "trainer.min_steps": [-1],
    "trainer.log_every_n_steps": [0, -1],
    "trainer.accumulate_grad_batches": [0, -1],
    "trainer.gradient_clip_val": [-1, math.nan, math.inf],
    "model.segments_per_chunk": [0, -1],
    "model.memory_dropout": [-0.1, 1.0, math.nan],
    "model.window_dropout": [-0.1, 1.0, math.nan],
    "model.write_cost": [-0.1, math.nan, math.inf],
    "model.write_cost_from": [-1],
    "model.seed": [-1, 2**64],
    "model.vocab_size": [0, -1],
    "model.hidden_size": [0, -1],
    "model.intermediate_size": [0, -1],
    "model.num_hidden_layers": [0, -1],
    "model.num_attention_heads": [0, -1],
    "model.num_key_value_heads": [0, -1],
    "model.head_dim": [0, -1],
    "model.sliding_window": [0, -1],
    "model.output_memory_dim": [0, -1],
    "model.gate_init": [math.nan, math.inf],
    "model.rope_theta": [0.0, -1.0, math.nan, math.inf],
    "model.rms_norm_eps": [-1.0, math.nan],
    "model.initializer_range": [-1.0, math.nan],
    "model.embedding_range": [-1.0, math.nan],
    "model.optimizer.lr": [-1.0, math.nan, math.inf],
    "model.optimizer.gate_lr": [-1.0, math.nan, math.inf],
    "model.optimizer.weight_decay": [-1.0, math.nan],
    "model.optimizer.betas": [[1.0, 0.5], [0.5, math.nan]],
    "model.optimizer.eps": [-1.0, math.nan],
    "model.optimizer.warmup_steps": [-1],
    "model.optimizer.decay_steps": [-1],
    "model.optimizer.final_lr": [-1.0, math.nan],
    "model.optimizer.ema_decay": [0.0, 1.0, math.nan],
    "data.segment_length": [0, -1],
    "data.segments_per_window": [0, -1],
    "data.lanes": [0, -1],
    "data.micro_batch_size": [0, -1],
    "data.seed": [-1, 2**63],
    "data.num_workers": [-1],
    "data.limit_validation_tokens_per_document": [0, -1],
    "data.context_parallel": [0, -1],
    "data.cache_gb": [0.0, -1.0, math.nan, math.inf],
    "hang_timeout": [0.0, -1.0, math.nan],
    "spike_threshold": [0.0, -1.0, math.nan, math.inf],
    "spike_window": [3, -1],
    "max_skips": [0, -1],
    "checkpoint.every_n_steps": [0, -1],
    "checkpoint.keep_last": [0, -1],
    "checkpoint.keep_every_n_steps": [0, -1],
    "checkpoint.keep_every_hours": [0.0, -1.0, math.nan],
}
# Lightning refuses wrong ones itself: it looks for so many devices.
LEFT_TO_LIGHTNING = {"trainer.devices", "trainer.num_nodes"}


@pytest.mark.slow
def test_every_number_out_of_range_is_named(unchanged, tmp_path):
    """Also NaN and infinity, and before any training."""
    numbers = {name for name, (value, *_) in USED.items() if type(value) in (int, float)}
    optional = {"model.segments_per_chunk", "model.optimizer.betas", "model.embedding_range", "data.segment_length"}
    assert numbers | optional == WRONG.keys() | LEFT_TO_LIGHTNING
    for name, values in WRONG.items():
        for value in values:
            given = {"data.train": str(tmp_path / "shards"), "trainer.max_steps": 3, name: value}
            with pytest.raises((ValueError, MisconfigurationException, StrictDataclassError)) as refused:  # noqa: PT012
                cli = made("--config", config(given, tmp_path / "wrong.yaml"))
                cli.datamodule.trainer = cli.trainer
                cli.datamodule.setup("fit")
            assert name.rpartition(".")[2] in str(refused.value), (name, value, refused.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.callbacks", "ModelCheckpoint"], "found ModelCheckpoint"),
        (["--trainer.callbacks", "EMAWeightAveraging"], "found EMAWeightAveraging"),
        (
            ["--trainer.strategy", "deepspeed"],
            "found deepspeed, expected auto, ddp, zero1, zero2 or zero3: checkpoints",
        ),
        (
            ["--trainer.strategy", "ddp_spawn"],
            "found ddp_spawn, expected auto, ddp, zero1, zero2 or zero3: a rank is",
        ),
        (["--trainer.accelerator", "cpu", "--trainer.devices", "-1"], "`devices` selected with `CPUAccelerator`"),
        (["--trainer.val_check_interval", "00:01:00:00"], "expected a number of micro-batches"),
    ],
)
def test_what_would_end_a_run_later_is_refused_at_its_start(words, message):
    with pytest.raises(ValueError, match=message):
        made("--data.train", "shards", "--trainer.max_steps", "3", *words)


def test_environment_variables_in_a_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("INFINI_TEST_DATA", "/somewhere")
    text = "data: {train: '${oc.env:INFINI_TEST_DATA}/train', validation: '${oc.env:INFINI_NOT_SET,held-out}'}\n"
    (tmp_path / "run.yaml").write_text(text + "model: {optimizer: {lr: 1e-3}}\n")
    cli = made("--config", str(tmp_path / "run.yaml"), "--trainer.max_steps", "3")
    assert cli.datamodule.given == {"train": "/somewhere/train", "validation": "held-out"}
    assert cli.model.options.lr == 1e-3
    monkeypatch.delenv("INFINI_TEST_DATA")
    with pytest.raises(ValueError, match=r"'INFINI_TEST_DATA' not found\W+full_key: data.train"):
        made("--config", str(tmp_path / "run.yaml"))
