"""The weights that a run begins with: drawn from a seed, or those of another model or checkpoint."""

from pathlib import Path

import torch
from torch import nn

from infini_train.model import InfiniForCausalLM
from infini_train.model.loading import fitting, read_safetensors

from .checkpoint_format import read_model
from .strategy import gathered, whole_modules


def draw_weights(model: InfiniForCausalLM, seed: int) -> None:
    """Draw the weights module by module, so that under ZeRO-3 no rank ever holds the whole model.

    Args:
        model: its weights are set in place.
        seed: of the draws. The global random state stays as it is.
    """

    def draw(module: nn.Module) -> None:
        with gathered(module.parameters(recurse=False)):
            model._init_weights(module)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.apply(draw)


def copy_weights(model: InfiniForCausalLM, source: Path, average: bool | None = None) -> None:
    """Copy the weights of another model, one parameter at a time, as under ZeRO-3 no rank may hold them all.

    Args:
        model: its weights are set in place.
        source: directory of a checkpoint, or of an exported or imported model.
        average: whether to take the moving average of a checkpoint's weights; None: `source` is no checkpoint.

    Raises:
        ValueError: the weights of `source` do not fit this model.
    """
    weights = read_safetensors(source) if average is None else read_model(source, average=average)[1]
    with whole_modules():  # it makes a model to compare the shapes
        weights = fitting(weights, model.config, source)
    for name, p in model.named_parameters():
        with gathered([p]), torch.no_grad():
            p.copy_(weights[name])
