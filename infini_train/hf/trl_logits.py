"""Lets TRL's trainers train models with an output memory, which changes logits beyond hidden states times weights.

The trainers multiply hidden states and output weights themselves, by `trl.trainer.utils.add_fused_lm_head`, and no
setting makes them take the logits of the model's `forward`. So that function is replaced.
"""

import functools
import importlib
import types
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from infini_train.model.cross_entropy import IGNORED

TRAINERS = ("sft", "dpo", "kto", "grpo", "rloo")


def use_model_logits() -> None:
    """Let TRL's SFT, DPO, KTO, GRPO and RLOO trainers use the own logits of models with an output memory.

    This concerns the trainers that are made afterwards. They then hold the logits of a whole batch, [rows, tokens,
    vocabulary]. Other models are trained as without this call.
    """
    for name in TRAINERS:
        trainer: Any = importlib.import_module(f"trl.trainer.{name}_trainer")
        trainer.add_fused_lm_head = add_head


def add_head(
    model: PreTrainedModel,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """Stand in for TRL's `add_fused_lm_head`, whose arguments these are."""
    if not getattr(model, "has_output_memory", False):
        add_fused_lm_head(model, temperature, cast_lm_head_to_fp32, outputs)
    elif cast_lm_head_to_fp32:
        raise ValueError("cast_lm_head_to_fp32: found True, expected False for a model with an output memory")
    else:
        add_logits_head(model, temperature, outputs)


def add_logits_head(model: PreTrainedModel, temperature: float, outputs: tuple[str, ...]) -> None:
    """Let `model(..., labels=labels, fused_lm_head=True)` return what TRL's head returns, from the model's logits.

    Args:
        model: the model, whose attribute `forward` is replaced; other calls go to the original.
        temperature: logits are divided by it.
        outputs: the fields of TRL's `FusedCausalLMOutput` that are wanted beside `loss` and `log_probs`.
    """
    original = model.forward

    @functools.wraps(type(model).forward)  # `generate` looks at the signature
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return original(*args, **kwargs)
        labels_BT, items = kwargs.pop("labels", None), kwargs.pop("num_items_in_batch", None)
        if labels_BT is None or kwargs.get("shift_labels") is not None:
            raise ValueError(
                "labels: found none or shifted ones, expected those of whole rows (no context parallelism)"
            )
        logits_BTV = original(*args, **{**kwargs, "use_cache": False}).logits[:, :-1]
        mask_BT, labels_BT = labels_BT[:, 1:] != IGNORED, labels_BT[:, 1:]
        if (padding := kwargs.get("attention_mask")) is not None:  # nothing predicts the token after padding
            mask_BT = mask_BT & padding[:, :-1].bool()
        return per_token(logits_BTV, labels_BT, mask_BT, temperature, outputs, items)

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]


def per_token(
    logits_BTV: Tensor,
    labels_BT: Tensor,
    mask_BT: Tensor,
    temperature: float,
    outputs: tuple[str, ...],
    items: Tensor | int | None,
) -> FusedCausalLMOutput:
    """Compute the fields of TRL's output, 0 where `mask_BT` is false.

    Args:
        logits_BTV: logits of the tokens before the last, any floating dtype; the fields have at least float32.
        labels_BT: int64, the token that follows each; any value where `mask_BT` is false.
        mask_BT: bool, where there is a label.
        temperature: logits are divided by it.
        outputs: the fields that are wanted beside `loss` and `log_probs`.
        items: what the sum of losses is divided by; None: the number of labels.
    """
    wide = torch.promote_types(logits_BTV.dtype, torch.float32)
    logits_NV, labels_N1 = logits_BTV[mask_BT].to(wide) / temperature, labels_BT[mask_BT][:, None]
    log_p_NV = logits_NV.log_softmax(-1)
    found = {"log_probs": log_p_NV.gather(-1, labels_N1)[:, 0]}
    if "entropy" in outputs:
        found["entropy"] = -(log_p_NV.exp() * log_p_NV).sum(-1)
    with torch.no_grad():
        if "log_sum_sq_probs" in outputs:
            found["log_sum_sq_probs"] = (2 * log_p_NV).logsumexp(-1)
        if "mean_logits" in outputs:
            found["mean_logits"] = logits_NV.mean(-1)
        if "is_top1" in outputs:
            found["is_top1"] = logits_NV.argmax(-1) == labels_N1[:, 0]
    # In rows without labels `masked_scatter` keeps the graph, so that backward gives zeros.
    fields = {name: x_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, x_N) for name, x_N in found.items()}
    divisor = mask_BT.sum().clamp(min=1) if items is None else items
    return FusedCausalLMOutput(loss=-fields["log_probs"].sum() / divisor, label_mask=mask_BT, **fields)
