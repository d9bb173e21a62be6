"""The toy's tasks on the model of infini_train itself: same lanes, windows and scores (arguments as research/toy.py).

nice -n 19 env OMP_NUM_THREADS=1 python research/framework.py --task overwrite --pairs 32 --values 32 --windows 4
"""

import torch
import toy
from torch import nn

from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.training.optim import OptimizerOptions, parameter_groups


class Model(nn.Module):
    """The interface of toy.Model around an InfiniForCausalLM."""

    def __init__(self, a, vocab):
        super().__init__()
        self.a = a
        self.inner = InfiniForCausalLM(
            InfiniConfig(
                vocab_size=vocab,
                hidden_size=a.dim,
                intermediate_size=2 * a.dim,
                num_hidden_layers=a.layers,
                num_attention_heads=a.heads,
                num_key_value_heads=a.kv_heads or a.heads,
                head_dim=a.head_dim,
                segment_length=a.S,
                memory=a.memory,
                initializer_range=a.init,
            )
        )
        self.blocks = []

    def empty(self, b):
        return self.inner.init_memory(b)

    def forward(self, ids, states):
        out = self.inner(ids, memory=states)
        return out.logits, out.memory


def groups(a, model):
    return parameter_groups(model.inner, OptimizerOptions(lr=a.lr, gate_lr=a.gate_lr, weight_decay=a.wd))


if __name__ == "__main__":
    toy.Model, toy.groups = Model, groups
    toy.main()
