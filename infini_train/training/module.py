"""The Lightning module: one window of every lane per step, truncated BPTT, loss weighted by tokens."""

import sys
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.initialization import no_init_weights

from infini_train.data.batches import IGNORED, Batch
from infini_train.data.datamodule import LaneDataModule
from infini_train.data.streaming import StreamingDataModule
from infini_train.files import sha256_of_file
from infini_train.metrics.buckets import BUCKETS, bucket_name, bucket_of
from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.model.configuration import MemoryRuleName
from infini_train.model.context import ContextGroup
from infini_train.model.loading import fitting, read_safetensors
from infini_train.model.memory_rule import MemoryState

from .architecture import NEW, config_of
from .known_failures import known_failures
from .lane_memory import LaneMemory, dropped, emptied
from .optim import OptimizerOptions, build
from .strategy import gathered


def compile_layers(model: InfiniForCausalLM) -> None:
    """torch.compile every decoder layer; what cannot be compiled runs as it is, and torch warns."""
    # Windows differ in whether documents begin, and inside how many segments: more shapes than torch's limit of 8.
    torch._dynamo.config.suppress_errors = True
    torch._dynamo.config.recompile_limit = 32
    for layer in model.model.layers:
        layer.compile(dynamic=False)


class InfiniModule(LightningModule):
    """Trains an Infini-attention decoder on windows of long documents.

    Args:
        pretrained: directory of an Infini model (`infini-train import` or `export` wrote it) to start from. Options
            of the architecture may then be left out; those that are given must be the directory's. Resuming needs
            its config.json only.
        vocab_size: of the tokenizer; this and all down to tie_word_embeddings, none: that of `pretrained`, or of a
            new model of 12 layers, 768 wide, with a vocabulary of 32,000.
        hidden_size: width of the decoder.
        intermediate_size: width of the SwiGLU layer.
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads, each with a memory of its own.
        head_dim: of one head; none: hidden_size / num_attention_heads in a new model.
        memory: the memory rule.
        gate_init: initial beta; the memory's share is sigmoid(beta).
        rope_theta: base of the rotary embedding.
        rms_norm_eps: of all norms.
        initializer_range: standard deviation of initial weights.
        embedding_range: that of input embeddings; none: initializer_range.
        tie_word_embeddings: input and output embeddings are one matrix.
        segment_length: tokens of a segment; taken from data.segment_length. May be shorter than that of
            `pretrained`, but not longer: those positions it has never seen.
        activation_checkpointing: recompute each layer in backward: less memory, about a third more FLOPs.
        compile: torch.compile every decoder layer: for GPUs, and for hours on a CPU (docs/performance.md). The first
            step takes up to a minute longer, once for each machine that keeps TORCHINDUCTOR_CACHE_DIR. Validation
            runs as it is.
        memory_dropout: share of lanes that drop their memory before a step's window and go on as if their document
            began there. Long documents begin so seldom that a model would never learn to do without a memory.
        write_cost: price of writing, nats a token: added to the loss (not to the one that is logged) times the
            density of the writes, 0 to 1. Only for selective-delta; lets long stretches go unwritten, to the bit.
        write_cost_from: step from which writing costs; before, the memory learns what it is good for.
        optimizer: parameter groups and schedule.
        seed: of the initial weights and of memory_dropout, whose draws are a function of the step: checkpoints hold
            no random state.

    Raises:
        ValueError: for contradictory values; lists all that is wrong.
        FileNotFoundError: no model in `pretrained`.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        vocab_size: int | None = None,
        hidden_size: int | None = None,
        intermediate_size: int | None = None,
        num_hidden_layers: int | None = None,
        num_attention_heads: int | None = None,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        memory: MemoryRuleName | None = None,
        gate_init: float | None = None,
        rope_theta: float | None = None,
        rms_norm_eps: float | None = None,
        initializer_range: float | None = None,
        embedding_range: float | None = None,
        tie_word_embeddings: bool | None = None,
        segment_length: int = 2048,
        activation_checkpointing: bool = False,
        compile: bool = False,
        memory_dropout: float = 0.0,
        write_cost: float = 0.0,
        write_cost_from: int = 0,
        optimizer: OptimizerOptions | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.options = optimizer or OptimizerOptions()
        wrong = self.options.wrong()
        costs = {"write_cost": write_cost, "write_cost_from": write_cost_from}
        wrong += [f"model.{name}: found {n}, expected at least 0" for name, n in costs.items() if n < 0]
        if not 0 <= memory_dropout < 1:
            wrong.append(f"model.memory_dropout: found {memory_dropout}, expected at least 0 and below 1")
        if wrong:
            raise ValueError("\n".join(wrong))
        options = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": num_key_value_heads,
            "head_dim": head_dim,
            "memory": memory,
            "gate_init": gate_init,
            "rope_theta": rope_theta,
            "rms_norm_eps": rms_norm_eps,
            "initializer_range": initializer_range,
            "embedding_range": embedding_range,
            "tie_word_embeddings": tie_word_embeddings,
        }
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        self.pretrained = None if pretrained is None else Path(pretrained)
        if self.pretrained:
            self.config = config_of(self.pretrained, given, segment_length)
        else:
            given = {**NEW, **given}
            rope = {"rope_type": "default", "rope_theta": given.pop("rope_theta")}
            self.config = InfiniConfig(**given, segment_length=segment_length, rope_parameters=rope)
        self.activation_checkpointing = activation_checkpointing
        self.compiled = compile
        self.memory_dropout = memory_dropout
        self.write_cost, self.write_cost_from = write_cost, write_cost_from
        self.seed = seed
        self.model: InfiniForCausalLM | None = None
        self.starts_fresh = True  # false: weights come from a checkpoint (of which the trainer tells too late)
        self.lanes = LaneMemory()
        self.context: ContextGroup | None = None  # the ranks that share this one's windows
        self.step_loss: Tensor | None = None  # of the micro-batches of the current step, this rank's share

    def setup(self, stage: str) -> None:
        data: LaneDataModule | StreamingDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        self.check_data(data)
        if self.compiled and getattr(self.trainer.strategy, "zero_stage_3", False):
            raise ValueError(
                "model.compile: found true, expected false with ZeRO-3, whose hooks gather the weights of each module"
            )
        if (ranks := data.context_parallel) > 1:
            self.context = ContextGroup(torch.distributed.new_subgroups(ranks)[0])
            self.lanes.kept = self.trainer.global_rank % ranks == 0  # all have the same
        if stage == "fit" and self.trainer.is_global_zero:
            segments = data.segments_per_window
            tokens_D = data.index["train"].tokens_D if isinstance(data, LaneDataModule) else None  # of a stream
            for line in known_failures(self.config, self.options, segments_per_window=segments, tokens_D=tokens_D):
                print(f"infini-train: warning: {line}", file=sys.stderr, flush=True)

    def check_data(self, data: LaneDataModule | StreamingDataModule) -> None:
        """Raises ValueError if this model cannot take these datasets."""
        data.check_model(self.config.vocab_size, self._tokenizer_sha256(data))

    def _tokenizer_sha256(self, data: LaneDataModule | StreamingDataModule) -> str | None:
        """Of the tokenizer that came with `pretrained`, of the dataset's kind if there are two; None if none came."""
        if self.pretrained is None:
            return None
        names = [data.tokenizer_file, "tokenizer.json", "tokenizer.model"]
        file = next((self.pretrained / name for name in names if (self.pretrained / name).is_file()), None)
        return None if file is None else sha256_of_file(file)

    def configure_model(self) -> None:
        if self.model is not None:  # Lightning calls this once per entry point
            return
        with no_init_weights():
            self.model = InfiniForCausalLM(self.config)  # ZeRO-3 has split its parameters when this returns
        self.model.tie_weights()  # which goes with initialisation
        if self.starts_fresh:
            self._fill(self.model)
        if self.activation_checkpointing:
            self.model.activation_checkpointing_enable()
        if self.compiled:
            compile_layers(self.model)

    def _fill(self, model: InfiniForCausalLM) -> None:
        """First weights, module by module, so that no rank holds all of a model that ZeRO-3 has split."""
        if self.pretrained:
            weights = fitting(read_safetensors(self.pretrained), self.config, self.pretrained)
            for name, p in model.named_parameters():
                with gathered([p]), torch.no_grad():
                    p.copy_(weights[name])
            return

        def initialise(module: nn.Module) -> None:
            with gathered(module.parameters(recurse=False)):
                model._init_weights(module)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model.apply(initialise)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        assert self.model is not None
        optimizer, scheduler = build(self.model, self.options, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        # A checkpoint holds the rate of its own schedule's next step; a run that was given more steps has another.
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LambdaLR)
        rules = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        for group, peak, share in rules:
            group["lr"] = peak * share(scheduler.last_epoch)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Only what the device computes with moves; `starts` stays, so that choosing a fast path costs no sync."""
        moved = {name: batch[name].to(device, non_blocking=True) for name in ("input_ids", "labels")}
        return {**batch, **moved}

    def token_losses(
        self, batch: Batch, memory: list[MemoryState] | None
    ) -> tuple[Tensor, Tensor, list[MemoryState], Tensor | None]:
        """Sum of the cross-entropies of all tokens; each of them without a gradient, [B, T], 0 where there is no
        label (both float32); the memories after; how densely they were written (InfiniModelOutput.density)."""
        assert self.model is not None
        out = self.model.model(batch["input_ids"], starts=batch["starts"], memory=memory, context=self.context)
        total, losses = self.model.lm_head(out.last_hidden_state, batch["labels"])
        assert out.memory is not None
        return total, losses, out.memory, out.density

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        after = batch["cursor_after"]
        assert after is None or after["step"] == self.trainer.global_step + 1, "batches and steps went apart"
        memory = self.lanes.take(batch["lane_ids"], self.device)
        if self.memory_dropout and memory is not None:
            step, lanes = self.trainer.global_step, batch["lane_ids"]
            memory = emptied(memory, dropped(self.memory_dropout, seed=self.seed, step=step, lane_ids=lanes))
        total, _, memory, density = self.token_losses(batch, memory)
        self.lanes.put(batch["lane_ids"], memory)
        loss = total / batch["step_tokens"]  # this micro-batch's share of the mean over the whole step
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        self.step_loss = loss.detach() if first or self.step_loss is None else self.step_loss + loss.detach()
        # Lightning divides by the micro-batches of a step, and the strategy averages gradients over ranks.
        loss = loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)
        # A mean over rows, and every micro-batch of every rank has as many: their mean is that over all lanes.
        if density is None or not self.write_cost or self.trainer.global_step < self.write_cost_from:
            return loss
        return loss + self.write_cost * density

    def ends_step(self, batch_idx: int) -> bool:
        """Whether this micro-batch is the last of its optimizer step."""
        return (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0

    def mean_step_loss(self) -> Tensor:
        """Loss per token of the step that just ended, over all ranks and micro-batches."""
        assert self.step_loss is not None
        return self.trainer.strategy.reduce(self.step_loss.clone(), reduce_op="sum")

    def on_validation_epoch_start(self) -> None:
        # Row 0: memory on, 1: memory off; columns: sum of losses by bucket of the segment's number in its document.
        self.validation_losses = torch.zeros(2, BUCKETS, dtype=torch.float64, device="cpu")
        self.validation_tokens = torch.zeros(BUCKETS, dtype=torch.float64, device="cpu")
        self.validation_memory: list[MemoryState] | None = None

    # Hooks watch it (MemoryMetrics), with and without memories, with and without starts: much to compile, for little.
    @torch.compiler.set_stance("force_eager")
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert self.model is not None
        _, losses, memory, _ = self.token_losses(batch, self.validation_memory)
        with self.model.memory_off():
            _, without, *_ = self.token_losses(batch, self.validation_memory)
        self.validation_memory = memory
        # Padding (-1) has no labels, so whatever its bucket it counts nowhere.
        segments = batch["segment_index"].clamp_min(0).flatten().tolist()
        buckets = torch.tensor([bucket_of(segment) for segment in segments])
        size = self.config.segment_length
        for row, values in enumerate((losses, without)):
            sums = values.unflatten(1, (-1, size)).sum(-1).flatten().cpu().double()
            self.validation_losses[row].index_add_(0, buckets, sums)
        counts = (batch["labels"] != IGNORED).unflatten(1, (-1, size)).sum(-1).flatten().cpu().double()
        self.validation_tokens.index_add_(0, buckets, counts)

    def on_validation_epoch_end(self) -> None:
        reduce = self.trainer.strategy.reduce
        losses = reduce(self.validation_losses.to(self.device), reduce_op="sum").cpu()
        tokens = reduce(self.validation_tokens.to(self.device), reduce_op="sum").cpu()
        on, off = (losses.sum(1) / tokens.sum()).tolist()
        values = {"val/loss": on, "val/memory_benefit": off - on}
        table = Table("segment", "tokens", "loss", "memory off", title="validation loss, nats per token")
        for bucket in torch.nonzero(tokens)[:, 0].tolist():
            name, here = bucket_name(bucket), (losses[:, bucket] / tokens[bucket]).tolist()
            values[f"val/segment_{name}"], values[f"val/segment_{name}_memory_off"] = here
            table.add_row(name, f"{int(tokens[bucket]):,}", *(f"{loss:.4f}" for loss in here))
        table.add_row("all", f"{int(tokens.sum()):,}", f"{on:.4f}", f"{off:.4f}")
        self.validation_memory = None
        self.log_dict(values, logger=False)
        for logger in self.loggers:  # Lightning would log one step too early
            logger.log_metrics(values, step=self.trainer.global_step)
        if self.trainer.state.fn == "validate" and self.trainer.is_global_zero:
            Console().print(table)
