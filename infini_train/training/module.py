"""The Lightning module: one window of every lane per step, truncated BPTT, loss weighted by tokens."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from infini_train.data.datamodule import IGNORED, Batch
from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.model.memory import MemoryState

from .lane_memory import LaneMemory
from .optim import OptimizerOptions, build

BUCKETS = 32  # of segment numbers, by powers of two: 0, 1, 2-3, 4-7, ...


def bucket_name(bucket: int) -> str:
    low, high = (0, 0) if bucket == 0 else (2 ** (bucket - 1), 2**bucket - 1)
    return f"{low}" if low == high else f"{low}-{high}"


class InfiniModule(LightningModule):
    """Trains an Infini-attention decoder on windows of long documents.

    Args:
        vocab_size: of the tokenizer.
        hidden_size: width of the decoder.
        intermediate_size: width of the SwiGLU layer.
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads, each with a memory of its own.
        head_dim: of one head; none: hidden_size / num_attention_heads.
        segment_length: tokens of a segment; taken from data.segment_length.
        memory: the memory rule.
        gate_init: initial beta; the memory's share is sigmoid(beta).
        rope_theta: base of the rotary embedding.
        rms_norm_eps: of all norms.
        initializer_range: standard deviation of initial weights.
        tie_word_embeddings: input and output embeddings are one matrix.
        activation_checkpointing: recompute each layer in backward: less memory, about a third more FLOPs.
        optimizer: parameter groups and schedule.
        seed: of the initial weights. Nothing else here is random, so checkpoints hold no random state.

    Raises:
        ValueError: for contradictory values; lists all that is wrong.
    """

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 768,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int = 4,
        head_dim: int | None = None,
        segment_length: int = 2048,
        memory: Literal["paper-linear", "paper-delta"] = "paper-linear",
        gate_init: float = 0.0,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        activation_checkpointing: bool = False,
        optimizer: OptimizerOptions | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.options = optimizer or OptimizerOptions()
        if wrong := self.options.wrong():
            raise ValueError("\n".join(wrong))
        self.config = InfiniConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim,
            segment_length=segment_length,
            memory=memory,
            gate_init=gate_init,
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
            rms_norm_eps=rms_norm_eps,
            initializer_range=initializer_range,
            tie_word_embeddings=tie_word_embeddings,
        )
        self.activation_checkpointing = activation_checkpointing
        self.seed = seed
        self.model: InfiniForCausalLM | None = None
        self.lanes = LaneMemory()
        self.step_loss: Tensor | None = None  # of the micro-batches of the current step, this rank's share

    def setup(self, stage: str) -> None:
        self.trainer.datamodule.check_model(self.config.vocab_size)  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        if self.model is not None:  # Lightning calls this once per entry point
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.model = InfiniForCausalLM(self.config)
        if self.activation_checkpointing:
            self.model.activation_checkpointing_enable()

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

    def token_losses(self, batch: Batch, memory: list[MemoryState] | None) -> tuple[Tensor, list[MemoryState]]:
        """Cross-entropy of every token, float32 [B, T], 0 where there is no label, and the memories after."""
        assert self.model is not None
        out = self.model.model(batch["input_ids"], starts=batch["starts"], memory=memory)
        logits = self.model.lm_head(out.last_hidden_state)
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), batch["labels"].flatten(), reduction="none", ignore_index=IGNORED
        )
        assert out.memory is not None
        return losses.view_as(batch["labels"]), out.memory

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        after = batch["cursor_after"]
        assert after is None or after["step"] == self.trainer.global_step + 1, "batches and steps went apart"
        losses, memory = self.token_losses(batch, self.lanes.take(batch["lane_ids"], self.device))
        self.lanes.put(batch["lane_ids"], memory)
        loss = losses.sum() / batch["step_tokens"]  # this micro-batch's share of the mean over the whole step
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        self.step_loss = loss.detach() if first or self.step_loss is None else self.step_loss + loss.detach()
        # Lightning divides by the micro-batches of a step, and the strategy averages gradients over ranks.
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

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

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert self.model is not None
        losses, memory = self.token_losses(batch, self.validation_memory)
        with self.model.memory_off():
            without, _ = self.token_losses(batch, self.validation_memory)
        self.validation_memory = memory
        # Bucket of segment i: 0 for 0, else 1 + floor(log2 i); padding has no labels, so it counts nowhere.
        segments = batch["segment_index"].clamp_min(0)
        buckets = torch.where(segments == 0, 0, 1 + segments.clamp_min(1).float().log2().floor().long()).flatten()
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
