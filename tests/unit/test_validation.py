"""Validation counts every token of every document once, by segment, with the memory on and off."""

import math
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer

from infini_train.data.datamodule import LaneDataModule
from infini_train.training.checkpoint_io import DirectoryIO
from infini_train.training.module import InfiniModule
from tests.helpers.datasets import make_dataset

S = 8


@pytest.mark.parametrize("memory", ["paper-linear", "paper-delta", "selective-delta"])
def test_loss_by_segment_equals_documents_read_alone(tmp_path, memory, monkeypatch):
    documents = make_dataset(tmp_path / "shards", [300, 2, 45, 7, 120, 64, 33], vocab_size=40)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    module = InfiniModule(**sizes, **heads, segment_length=S, memory=memory, initializer_range=0.5)
    path = str(tmp_path / "shards")
    data = LaneDataModule(path, path, segment_length=S, segments_per_window=3, micro_batch_size=3, num_workers=0)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", devices=1, plugins=[DirectoryIO()], **quiet)
    rows = []
    losses_of = module.run_window
    monkeypatch.setattr(module, "run_window", lambda b, m: rows.append(len(b["input_ids"])) or losses_of(b, m))
    trainer.validate(module, data)
    assert sum(rows) == 2 * sum(-(-len(d) // (3 * S)) for d in documents)  # on and off, no row of padding alone
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}

    # Each document whole, in one forward: no windows, no batch, no carried memory. Memory off: each segment alone.
    sums, counts = defaultdict(float), defaultdict(int)
    with torch.no_grad():
        for tokens in documents:
            ids = torch.from_numpy(tokens.astype("int64"))
            whole = module.model(ids[None]).logits[0]
            alone = torch.cat([module.model(part[None]).logits[0] for part in ids.split(S)])
            for name, logits in (("on", whole), ("off", alone)):
                losses = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
                for t, loss in enumerate(losses.tolist()):
                    segment = t // S
                    low = 0 if segment == 0 else 2 ** int(math.log2(segment))
                    high = max(0, 2 * low - 1)
                    key = f"{low}" if low == high else f"{low}-{high}"
                    sums[key, name] += loss
                    counts[key, name] += 1
    tokens = sum(n for (_, name), n in counts.items() if name == "on")
    assert tokens == sum(len(d) - 1 for d in documents)
    on, off = (sum(v for (_, name), v in sums.items() if name == which) / tokens for which in ("on", "off"))
    expected = {"val/loss": on, "val/memory_benefit": off - on}
    for (key, name), value in sums.items():
        suffix = "" if name == "on" else "_memory_off"
        expected[f"val/segment_{key}{suffix}"] = value / counts[key, name]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
