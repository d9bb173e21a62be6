"""DeepSpeed ZeRO on CUDA (nccl) and on CPU (gloo), under Lightning."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, StrategyRegistry
from torch import nn
from torch.optim import Optimizer

from . import fragments


def gathered(parameters: Iterable[nn.Parameter], writes: bool = True) -> AbstractContextManager[Any]:
    """Inside, parameters that ZeRO-3 has split are whole; what rank 0 writes to them stays. All ranks take part."""
    split = [p for p in parameters if hasattr(p, "ds_id")]
    if not split:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(split, modifier_rank=0 if writes else None)


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's strategy, made to run on CPU too, to scale gradients once, and to keep checkpoints of our format.

    Its options are Lightning's: `stage` (1, 2 or 3) and more, or instead of them all `config`, DeepSpeed's own as a
    JSON file or a dictionary.
    """

    strategy_name = "zero"

    # Lightning gives CPU devices no index; DeepSpeed's start-up wants one.
    @property
    def parallel_devices(self) -> Any:
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: Any) -> None:
        if devices:
            devices = [torch.device("cpu", i) if d.type == "cpu" else d for i, d in enumerate(devices)]
        self._parallel_devices = devices

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)  # DeepSpeedStrategy's only adds that it refuses a CPU

    def setup(self, trainer: Trainer) -> None:
        assert isinstance(self.model, nn.Module)
        built_split = all(hasattr(p, "ds_id") for p in self.model.parameters())
        assert built_split or not self.zero_stage_3, "ZeRO-3 was given a model that was built whole"
        super().setup(trainer)

    def _init_deepspeed_distributed(self) -> None:
        if not isinstance(self.accelerator, CUDAAccelerator):
            import deepspeed.ops

            # Compiling it takes 40 s, for an all-reduce that only inference uses.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        super()._init_deepspeed_distributed()

    def _format_config(self) -> None:
        assert isinstance(self.config, dict)
        self.config.setdefault("train_micro_batch_size_per_gpu", 1)  # for DeepSpeed's logs only
        self.config.setdefault("zero_allow_untested_optimizer", True)
        super()._format_config()
        # A step whose gradients are not finite is left out, on all ranks alike; NonFiniteGuard then stops the run.
        if "bf16" in self.config:
            self.config["bf16"].setdefault("check_grad_overflow", True)
        # torch's fused AdamW runs on CPU partitions as well, and its state has the same form everywhere.
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)

    def backward(self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Lightning has divided the loss by the micro-batches of a step already; DeepSpeed would do so again.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    @property
    def zero(self) -> Any:
        """DeepSpeed's ZeRO optimizer."""
        return self.deepspeed_engine.optimizer

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return {}  # the fragments have it

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # the fragments have it

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill weights and optimizer of the engine, which exists by now, and return the rest."""
        path = Path(checkpoint_path)
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn == "fit":
            held = fragments.held(self.lightning_module, self.zero, self.global_rank)
            fragments.load(path, held, self.zero.optimizer)
            self.refresh()
        else:
            self.load_weights(path)
        return fragments.read_state(path)

    def refresh(self) -> None:
        """Make the model's weights those of the float32 partitions, on all ranks."""
        zero = self.zero
        if not self.zero_stage_3:
            zero.update_lp_params()
            return
        for group, master in enumerate(zero.fp32_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[group].data.copy_(master.data)
            zero._unflatten_partitioned_parameters(group)

    def load_weights(self, path: Path) -> None:
        """Weights alone, without an optimizer (validation)."""
        assert self.lightning_module is not None
        with fragments.Fragments(path) as saved, torch.no_grad():
            for name, p in self.lightning_module.named_parameters():
                with gathered([p]):
                    p.copy_(saved.whole(fragments.WEIGHT, name, list(p.shape)))


for _stage in (1, 2, 3):
    StrategyRegistry.register(f"zero{_stage}", ZeroStrategy, description=f"DeepSpeed ZeRO-{_stage}", stage=_stage)
