"""Lightning strategy for DeepSpeed ZeRO, on CUDA (nccl) and on CPU (gloo)."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeGuard

import torch
from lightning import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy, StrategyRegistry
from torch import nn
from torch.optim import Optimizer

from . import fragments
from .muon import MuonWithAdamW


def gathered(parameters: Iterable[nn.Parameter], writes: bool = True) -> AbstractContextManager[Any]:
    """Return a context in which parameters that ZeRO-3 has split are whole. All ranks must enter it.

    Args:
        parameters: the parameters to gather; those that are not split are left as they are.
        writes: keep what rank 0 writes to the parameters inside the context.
    """
    split = [p for p in parameters if hasattr(p, "ds_id")]
    if not split:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(split, modifier_rank=0 if writes else None)


def is_ddp(strategy: Strategy) -> TypeGuard[DDPStrategy]:
    """Return whether this is torch's DDP. Lightning's DeepSpeed strategy is a subclass of that for DDP."""
    return isinstance(strategy, DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)


@contextmanager
def whole_modules() -> Iterator[None]:
    """Make new modules whole in this context, also where ZeRO-3 splits those that are made."""
    zero = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if zero is None or not zero.zero_init_context:
        yield
        return
    zero.shutdown_init_context()
    try:
        yield
    finally:
        zero.restore_init_context()


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, adapted to run on CPU too, and to write checkpoints in our format.

    Options are those of Lightning's strategy: either `stage` (1, 2 or 3) and others, or `config`, a JSON file or a
    dictionary with DeepSpeed's own options.
    """

    strategy_name = "zero"

    # Lightning gives CPU devices no index, but DeepSpeed's initialisation needs one.
    @property
    def parallel_devices(self) -> Any:
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: Any) -> None:
        if devices:
            devices = [torch.device("cpu", i) if d.type == "cpu" else d for i, d in enumerate(devices)]
        self._parallel_devices = devices

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)  # DeepSpeedStrategy's method only adds a check that refuses CPUs

    def setup(self, trainer: Trainer) -> None:
        assert isinstance(self.model, nn.Module)
        built_split = all(hasattr(p, "ds_id") for p in self.model.parameters())
        assert built_split or not self.zero_stage_3, "ZeRO-3 was given a model whose parameters are not split"
        super().setup(trainer)
        if trainer.state.fn == "fit" and isinstance(self.zero.optimizer, MuonWithAdamW):
            self.zero.optimizer.partition(self.model, self.zero, self.global_rank, self.root_device)

    def _init_deepspeed_distributed(self) -> None:
        if not isinstance(self.accelerator, CUDAAccelerator):
            import deepspeed.ops

            # Compiling this op takes 40 s, and only inference uses it.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        super()._init_deepspeed_distributed()

    def _format_config(self) -> None:
        assert isinstance(self.config, dict)
        self.config.setdefault("train_micro_batch_size_per_gpu", 1)  # used in DeepSpeed's logs only
        self.config.setdefault("zero_allow_untested_optimizer", True)
        super()._format_config()
        # DeepSpeed skips a step whose gradients are not finite, on all ranks; StepGuard then acts on it.
        if "bf16" in self.config:
            self.config["bf16"].setdefault("check_grad_overflow", True)
        # Use torch's fused AdamW for CPU partitions too, so that its state has the same form everywhere.
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)

    def backward(self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Lightning has already divided the loss by the number of micro-batches; DeepSpeed must not do so again.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    @property
    def zero(self) -> Any:
        """DeepSpeed's ZeRO optimizer."""
        return self.deepspeed_engine.optimizer

    # Weights and optimizer state are stored in fragments, not in Lightning's dictionary.
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return {}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights and optimizer state into the engine, which exists by now, and return the rest."""
        path = Path(checkpoint_path)
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn == "fit":
            self.load_training_state(path)
        else:
            self.load_weights(path)
        return fragments.read_state(path)

    def load_training_state(self, path: Path) -> None:
        """Load weights and optimizer state into the engine, on all ranks."""
        assert self.lightning_module is not None
        held = fragments.held(self.lightning_module, self.zero, self.global_rank)
        fragments.load(path, held, self.zero.optimizer)
        self.refresh()

    def refresh(self) -> None:
        """Update the model's weights from the float32 master partitions, on all ranks."""
        zero = self.zero
        if not self.zero_stage_3:
            zero.update_lp_params()
            return
        for group, master in enumerate(zero.fp32_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[group].data.copy_(master.data)
            zero._unflatten_partitioned_parameters(group)

    def load_weights(self, path: Path) -> None:
        """Load the weights only, for validation, where there is no optimizer."""
        assert self.lightning_module is not None
        with fragments.Fragments(path) as saved, torch.no_grad():
            for name, p in self.lightning_module.named_parameters():
                with gathered([p]):
                    p.copy_(saved.whole(fragments.WEIGHT, name, list(p.shape)))


for _stage in (1, 2, 3):
    StrategyRegistry.register(f"zero{_stage}", ZeroStrategy, description=f"DeepSpeed ZeRO-{_stage}", stage=_stage)
