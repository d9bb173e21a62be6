"""The Lightning module. A training step is one window of every lane, with truncated backpropagation through time.

A micro-batch takes the memories of its lanes from LaneMemory, runs the model over a window of tokens, and puts the
memories back without their graph. Gradients therefore reach back to the start of the window. The loss is a mean over
all labels of the optimizer step, whatever rank and micro-batch they are in.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from rich.console import Console
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers.initialization import no_init_weights

from infini_train.data.batches import Batch
from infini_train.data.datamodule import LaneDataModule
from infini_train.data.streaming import StreamingDataModule
from infini_train.files import sha256_of_file
from infini_train.model import InfiniForCausalLM
from infini_train.model.context import ContextGroup, exchanged_once
from infini_train.model.memory_rule import MemoryState
from infini_train.run_files import CONFIG, MODEL_CONFIG, read_json

from . import fragments
from .allocator import configure_malloc, has_glibc_malloc
from .architecture import Architecture, config_of
from .chunks import WindowLosses, window_losses
from .draws import dropped, window_dropped
from .initial_weights import copy_weights, draw_weights
from .known_failures import known_failures
from .lane_memory import LaneMemory, emptied
from .optim import OptimizerOptions, build, changes, forget_average
from .strategy import ZeroStrategy
from .validation import SegmentLosses, check_metric, without_padded_rows

OPTIMIZER_VERSION = "recipe"  # the key of `optim.VERSION` in a checkpoint, which had this name in older ones, too
# Fields of a model's configuration that no trained weight shows.
OF_INITIAL_WEIGHTS = ("gate_init", "initializer_range", "embedding_range")


def compile_layers(model: InfiniForCausalLM) -> None:
    """Compile every decoder layer with torch.compile; code that fails to compile runs eagerly, with a warning."""
    # torch compiles a layer again for windows in which documents start, and for other numbers of segments in which
    # they start. There are more such cases than torch's default limit of 8.
    torch._dynamo.config.suppress_errors = True
    torch._dynamo.config.recompile_limit = 32
    for layer in model.model.layers:
        layer.compile(dynamic=False)


def _options_of(checkpoint: Path) -> dict[str, Any]:
    """Return the options of the optimizer that wrote a checkpoint."""
    found: dict[str, Any] | None = yaml.safe_load((checkpoint / CONFIG).read_text())["model"]["optimizer"]
    return found or {}


class InfiniModule(LightningModule):
    """Trains an Infini-attention decoder on windows of long documents.

    Args:
        pretrained: directory of an Infini model to start from, written by `infini-train import` or `export`.
            Architecture options may then be left out; those that are given must agree with the directory's. Resuming
            needs only its config.json.
        segment_length: tokens of a segment; taken from data.segment_length. It may be shorter than that of
            `pretrained`, but not longer, because the model was never trained at later positions.
        activation_checkpointing: recompute each layer in the backward pass, which takes less memory and about a third
            more FLOPs.
        segments_per_chunk: run the network over so many segments of a window at a time, and recompute each chunk in
            the backward pass. The gradients are those of the whole window, and the activations those of one chunk
            (docs/performance.md says when to use which). None: the whole window at once.
        compile: run every decoder layer through torch.compile. This saves time on GPUs, and on a CPU in runs that
            take hours (docs/performance.md). The first step takes 10 to 25 s longer, but only once on a machine
            that keeps TORCHINDUCTOR_CACHE_DIR. Validation is not compiled.
        memory_dropout: share of lanes that drop their memory before a step's window and go on as if their document
            started there. Long documents start so seldom that a model would otherwise never learn to do without a
            memory.
        window_dropout: share of optimizer steps in which the layers' memories are all that is read of earlier
            segments: local attention sees its own segment alone, as if there were no `sliding_window`, and an output
            memory is only written. Without such steps, the layers' memories are hardly needed at the distances at
            which they are learned most easily (docs/memory.md).
        write_cost: cost of writing, in nats per token. The density of the writes (0 to 1) times this cost is added to
            the loss, but not to the loss that is logged. Only for selective-delta, which then learns to write nothing
            at all in long stretches of noise.
        write_cost_from: step from which writing has a cost. Before it, the model learns to use its memory.
        optimizer: parameter groups and schedule.
        seed: seed of the initial weights, of memory_dropout and of window_dropout. The draws of these are functions
            of the step, so that checkpoints hold no random state.
        options: architecture of the decoder; see `Architecture`.

    Raises:
        ValueError: values contradict one another; lists everything that is wrong.
        FileNotFoundError: `pretrained` holds no model.
    """

    model: InfiniForCausalLM  # made by configure_model

    def __init__(
        self,
        pretrained: str | None = None,
        segment_length: int = 2048,
        activation_checkpointing: bool = False,
        segments_per_chunk: int | None = None,
        compile: bool = False,
        memory_dropout: float = 0.0,
        window_dropout: float = 0.0,
        write_cost: float = 0.0,
        write_cost_from: int = 0,
        optimizer: OptimizerOptions | None = None,
        seed: int = 0,
        **options: Any,
    ):
        super().__init__()
        self.options = optimizer or OptimizerOptions()
        wrong = self.options.wrong()
        costs = {"write_cost": write_cost, "write_cost_from": write_cost_from}
        wrong += [
            f"model.{name}: found {n}, expected at least 0" for name, n in costs.items() if not 0 <= n < math.inf
        ]
        if segments_per_chunk is not None and segments_per_chunk < 1:
            wrong.append(f"model.segments_per_chunk: found {segments_per_chunk}, expected at least 1, or none")
        if not 0 <= seed < 2**64:
            wrong.append(f"model.seed: found {seed}, expected 0 to 2**64 - 1")
        shares = {"memory_dropout": memory_dropout, "window_dropout": window_dropout}
        wrong += [
            f"model.{k}: found {v}, expected at least 0 and below 1" for k, v in shares.items() if not 0 <= v < 1
        ]
        if wrong:
            raise ValueError("\n".join(wrong))
        architecture = Architecture(**options)
        self.pretrained = None if pretrained is None else Path(pretrained)
        if self.pretrained:
            self.config = config_of(self.pretrained, architecture.given(), segment_length)
        else:
            self.config = architecture.new_config(segment_length)
        if window_dropout and self.config.sliding_window is None and self.config.output_memory_dim is None:
            raise ValueError(
                f"model.window_dropout: found {window_dropout}, expected 0 without model.sliding_window and "
                "model.output_memory_dim: the layers' memories are all that is read of earlier segments anyway"
            )
        self.activation_checkpointing, self.segments_per_chunk = activation_checkpointing, segments_per_chunk
        self.compiled = compile
        self.memory_dropout, self.window_dropout = memory_dropout, window_dropout
        self.write_cost, self.write_cost_from = write_cost, write_cost_from
        self.seed = seed
        # The command line sets this to False if weights will come from a checkpoint, because the trainer itself says
        # so only after the weights have been initialised.
        self.starts_fresh = True
        self.weights_of: Path | None = None  # the checkpoint whose weights are the initial ones
        self.average_of_weights = False  # whether they are the moving average in that checkpoint
        self.optimizer_of: Path | None = None  # the checkpoint whose optimizer state a new run begins with
        self.lanes = LaneMemory()
        self.context: ContextGroup | None = None  # the ranks that share this rank's windows
        self.step_loss: Tensor | None = None  # this rank's share of the current step's loss, so far

    def setup(self, stage: str) -> None:
        data: LaneDataModule | StreamingDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        self.check_data(data)
        if self.compiled and getattr(self.trainer.strategy, "zero_stage_3", False):
            raise ValueError(
                "model.compile: found true, expected false with ZeRO-3, whose hooks gather the weights of each module"
            )
        if (ranks := data.context_parallel) > 1:
            if self.segments_per_chunk is not None:
                raise ValueError(
                    f"model.segments_per_chunk: found {self.segments_per_chunk}, expected none with "
                    f"data.context_parallel = {ranks}: a rank needs what all segments of the ranks before it write"
                )
            group = torch.distributed.new_subgroups(ranks)[0]
            # NCCL sets a group up in its first operation, in which all of its ranks have to take part.
            torch.distributed.all_reduce(torch.zeros(1, device=self.trainer.strategy.root_device), group=group)
            self.context = ContextGroup(group)
            self.lanes.saves = self.trainer.global_rank % ranks == 0  # the first rank of a group has the memories
        for stopping in self.trainer.early_stopping_callbacks if stage == "fit" else []:
            if stopping.strict and stopping.monitor != "loss":
                check_metric(stopping.monitor, "trainer.callbacks: EarlyStopping.monitor", self.trainer)
        segments = data.segments_per_window
        chunked = self.segments_per_chunk is not None and self.segments_per_chunk < segments
        if on_cpu := self.trainer.strategy.root_device.type == "cpu":
            configure_malloc(chunked)
        if stage == "fit" and self.trainer.is_global_zero:
            tokens_D = data.index["train"].tokens_D if isinstance(data, LaneDataModule) else None
            cost = self.write_cost
            lines = known_failures(
                self.config, self.options, segments_per_window=segments, write_cost=cost, tokens_D=tokens_D
            )
            for line in lines:
                print(f"infini-train: warning: {line}", file=sys.stderr, flush=True)
            if chunked and on_cpu and has_glibc_malloc():
                print(
                    "infini-train: windows in chunks are faster with jemalloc than with glibc's malloc, as with "
                    "LD_PRELOAD=libjemalloc.so.2; see docs/performance.md",
                    file=sys.stderr,
                    flush=True,
                )

    def check_data(self, data: LaneDataModule | StreamingDataModule) -> None:
        """Raise ValueError if this model cannot take these datasets."""
        data.check_model(self.config.vocab_size, self._tokenizer_sha256(data))

    def _tokenizer_sha256(self, data: LaneDataModule | StreamingDataModule) -> str | None:
        """Return the sha256 of the tokenizer in `pretrained`, or None if it has none.

        If there are two, it is the one of the same kind as the dataset's.
        """
        if self.pretrained is None:
            return None
        names = [data.tokenizer_file, "tokenizer.json", "tokenizer.model"]
        file = next((self.pretrained / name for name in names if (self.pretrained / name).is_file()), None)
        return None if file is None else sha256_of_file(file)

    def configure_model(self) -> None:
        if hasattr(self, "model"):  # Lightning calls this once per entry point
            return
        # ZeRO-3 partitions parameters as they are created, so they are initialised afterwards.
        with no_init_weights():
            self.model = InfiniForCausalLM(self.config)
        self.model.tie_weights()  # transformers does this in the initialisation that was skipped
        if self.starts_fresh:
            if self.weights_of:
                copy_weights(self.model, self.weights_of, self.average_of_weights)
            elif self.pretrained:
                copy_weights(self.model, self.pretrained)
            else:
                draw_weights(self.model, self.seed)
        if self.activation_checkpointing:
            # Layers are recomputed without exchanging again what other ranks have sent.
            options = {"use_reentrant": False, "context_fn": exchanged_once} if self.context else None
            self.model.activation_checkpointing_enable(options)
        if self.compiled:
            compile_layers(self.model)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer, scheduler = build(self.model, self.options, self.trainer.max_steps)
        self.group_options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        if self.optimizer_of is not None:
            if isinstance(self.trainer.strategy, ZeroStrategy):
                self.trainer.strategy.load_training_state(self.optimizer_of)
            else:
                held = fragments.held(self, None, self.trainer.global_rank)
                fragments.load(self.optimizer_of, held, self.trainer.optimizers[0])
        # Loading a checkpoint has put the earlier run's options into the optimizer. Those of this run count.
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LambdaLR)
        if self.options.ema_decay is None:
            forget_average(scheduler.optimizer)
        groups = scheduler.optimizer.param_groups
        scheduler.base_lrs = [options["initial_lr"] for options in self.group_options]
        for group, options, factor in zip(groups, self.group_options, scheduler.lr_lambdas, strict=True):
            group.update(options)
            group["lr"] = options["initial_lr"] * factor(scheduler.last_epoch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[OPTIMIZER_VERSION] = self.options.version
        for logger in self.loggers:  # those that collect lines before they write them
            logger.save()

    def prepare_to_resume(self, checkpoint: Path) -> list[str]:
        """Prepare for the state that will come from a checkpoint. To be called before training.

        Returns:
            a sentence for each option of the optimizer or of initial weights that is another than in the checkpoint.

        Raises:
            ValueError: the checkpoint is of another optimizer, whose state this one cannot use.
        """
        self.options.version = fragments.read_state(checkpoint).get(OPTIMIZER_VERSION, 0)
        saved, told = read_json(checkpoint / MODEL_CONFIG), []
        for name in OF_INITIAL_WEIGHTS:
            given = getattr(self.config, name)
            if name in saved and saved[name] != given:
                told.append(f"model.{name} stays {saved[name]}: {given} would only change initial weights")
                setattr(self.config, name, saved[name])
        return told + changes(self.options, _options_of(checkpoint))

    def take_optimizer(self, checkpoint: Path) -> list[str]:
        """Let a new run begin with the optimizer's state in a checkpoint. To be called before training.

        Returns:
            a sentence for each option of the optimizer that is another than in the checkpoint.

        Raises:
            ValueError: the checkpoint is of another optimizer, whose state this one cannot use.
        """
        self.optimizer_of = checkpoint
        return changes(self.options, _options_of(checkpoint))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move the tensors that the device computes with.

        `starts` stays on the CPU, so that choosing a fast path by its values needs no device sync.
        """
        if "segment_index" in batch and self.context is None:  # a rank of a context group sees only part of a row
            batch = without_padded_rows(batch)
        moved = {name: batch[name].to(device, non_blocking=True) for name in ("input_ids", "labels")}
        return {**batch, **moved}

    def run_window(self, batch: Batch, memory: list[MemoryState] | None, own_segment: bool = False) -> WindowLosses:
        """Run the model over the window of a micro-batch, from these memories (None: all empty); own_segment: as in
        `window_losses`."""
        return window_losses(
            self.model,
            batch["input_ids"],
            batch["labels"],
            starts=batch["starts"],
            memory=memory,
            segments_per_chunk=self.segments_per_chunk,
            context=self.context,
            own_segment=own_segment,
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Run one window of a micro-batch's lanes, and return the loss whose gradients are accumulated."""
        after = batch["cursor_after"]
        assert after is None or after["step"] == self.trainer.global_step + 1, "the batch is of another step"
        memory = self.lanes.take(batch["lane_ids"], self.device)
        draw = {"seed": self.seed, "step": self.trainer.global_step}
        if self.memory_dropout and memory is not None:
            memory = emptied(memory, dropped(self.memory_dropout, lane_ids=batch["lane_ids"], **draw))
        own_segment = window_dropped(self.window_dropout, **draw)
        total, _, memory, density = self.run_window(batch, memory, own_segment)
        self.lanes.put(batch["lane_ids"], memory)

        # This micro-batch's share of the mean over all tokens of the step. The shares of all ranks and micro-batches
        # add up to that mean.
        loss = total / batch["step_tokens"]
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        self.step_loss = loss.detach() if first or self.step_loss is None else self.step_loss + loss.detach()

        # Shares have to be added up, but Lightning divides the loss by the number of micro-batches in a step, and the
        # strategy averages gradients over ranks. Undo both.
        loss = loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

        # The density is a mean over the rows of this micro-batch. All micro-batches have equally many rows, so the
        # mean of their densities is the density over all lanes, and needs no factor.
        if density is None or not self.write_cost or self.trainer.global_step < self.write_cost_from:
            return loss
        return loss + self.write_cost * density

    def ends_step(self, batch_idx: int) -> bool:
        """Return whether this micro-batch is the last one of its optimizer step."""
        return (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0

    def log_values(self, values: dict[str, float]) -> None:
        """Pass values to all loggers at the current step; Lightning's log_dict would log them one step too early."""
        for logger in self.loggers:
            logger.log_metrics(values, step=self.trainer.global_step)

    def mean_step_loss(self) -> Tensor:
        """Return the loss of the step that just ended, in nats per token over all ranks and micro-batches."""
        assert self.step_loss is not None
        return self.sum_over_ranks(self.step_loss)

    def sum_over_ranks(self, step_loss: Tensor) -> Tensor:
        """Add up the ranks' shares of a step's loss, in nats per token. All ranks call it."""
        return self.trainer.strategy.reduce(step_loss.clone(), reduce_op="sum")

    def on_validation_epoch_start(self) -> None:
        self.segment_losses = SegmentLosses(list(self._lane_data().validation), self.config.segment_length)
        # Carried from one window to the next; the start of the next document resets it.
        self.validation_memory: list[MemoryState] | None = None

    # Validation runs eagerly. The hooks of MemoryMetrics, the memory on or off, and document starts or none would
    # make many variants to compile, for few batches.
    @torch.compiler.set_stance("force_eager")
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 0:
            self.validation_memory = None
        if self.validation_memory is not None:
            # Rows whose documents have ended are gone. If there are more rows than before, all of them
            # begin new documents.
            rows, before = len(batch["input_ids"]), len(next(iter(self.validation_memory[0].values())))
            cut = [{name: x[:rows] for name, x in state.items()} for state in self.validation_memory]
            self.validation_memory = cut if rows <= before else None
        _, on, memory, _ = self.run_window(batch, self.validation_memory)
        with self.model.memory_off():
            _, off, *_ = self.run_window(batch, self.validation_memory)
        self.validation_memory = memory
        self.segment_losses.add(dataloader_idx, batch, on, off)

    def on_validation_epoch_end(self) -> None:
        self.validation_memory = None
        sums = self.segment_losses
        sums.losses, sums.tokens = (
            self.trainer.strategy.reduce(x.to(self.device), reduce_op="sum").cpu() for x in (sums.losses, sums.tokens)
        )
        values: dict[str, float] = {}
        for found, table in sums.results():
            values |= found
            if self.trainer.state.fn == "validate" and self.trainer.is_global_zero:
                Console().print(table)
        self.log_dict(values, logger=False)
        self.log_values(values)

    def _lane_data(self) -> LaneDataModule:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, LaneDataModule)  # streams are not validated
        return data
