"""The anchors of `evaluate segments --anchors` against loops over single tokens."""

import json
import math

import pytest
import torch

from infini_train.data.index import DatasetIndex
from infini_train.evaluation.__main__ import main
from infini_train.evaluation.anchors import CACHE_THETA, CACHE_WEIGHT, HEAD_RATE, UNIGRAM_WEIGHT
from infini_train.evaluation.segments import segment_losses
from infini_train.model import InfiniConfig, InfiniForCausalLM
from tests.helpers.datasets import make_dataset

S, VOCABULARY = 4, 11
LENGTHS = [30, 9, 22, 3]
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}


def model_of() -> InfiniForCausalLM:
    torch.manual_seed(0)
    config = InfiniConfig(**SIZES, num_attention_heads=2, segment_length=S, initializer_range=0.5, sliding_window=S)
    return InfiniForCausalLM(config).double().eval()


def expected(model: InfiniForCausalLM, tokens: list[int]) -> dict[str, list[float]]:
    """Loss of every token but the first with each anchor, and without any, one token at a time."""
    ids = torch.tensor([tokens])
    hidden = model.model(ids).last_hidden_state[0]
    weight = model.lm_head.weight
    change = torch.zeros_like(weight)
    found: dict[str, list[float]] = {"on": [], "cache": [], "head": [], "unigram": []}
    for t in range(len(tokens) - 1):
        segment, y = t // S, tokens[t + 1]
        if t % S == 0 and segment >= 2:  # segment - 2 becomes far: one step on the sum of its losses
            step = torch.zeros_like(weight)
            for u in range((segment - 2) * S, (segment - 1) * S):
                error = torch.softmax((weight + change) @ hidden[u], 0)
                error[tokens[u + 1]] -= 1
                step += torch.outer(error, hidden[u] / hidden[u].norm())
            change = change - HEAD_RATE * step
        p = torch.softmax(weight @ hidden[t], 0)[y].item()
        found["on"].append(-math.log(p))
        far = range(max(segment - 1, 0) * S)
        if not far:
            for name in ("cache", "head", "unigram"):
                found[name].append(-math.log(p))
            continue
        cosines = [torch.cosine_similarity(hidden[t], hidden[u], dim=0).item() for u in far]
        votes = [math.exp(CACHE_THETA * c) for c in cosines]
        cache = sum(v for v, u in zip(votes, far, strict=True) if tokens[u + 1] == y) / sum(votes)
        unigram = sum(tokens[u + 1] == y for u in far) / len(far)
        found["cache"].append(-math.log((1 - CACHE_WEIGHT) * p + CACHE_WEIGHT * cache))
        found["unigram"].append(-math.log((1 - UNIGRAM_WEIGHT) * p + UNIGRAM_WEIGHT * unigram))
        found["head"].append(-torch.log_softmax((weight + change) @ hidden[t], 0)[y].item())
    return found


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_anchors_equal_loops(tmp_path, rows):
    model, documents = model_of(), make_dataset(tmp_path / "shards", LENGTHS, vocab_size=VOCABULARY)
    losses, _, anchors = segment_losses(model, DatasetIndex.load(tmp_path / "shards"), rows=rows, anchors=True)
    order = sorted(range(len(documents)), key=lambda d: -len(documents[d]))
    for place, d in enumerate(order):
        wanted = expected(model, documents[d].tolist())
        for name, found in [("on", losses.on), *anchors.sums.items()]:
            assert found[:, place].sum() == pytest.approx(sum(wanted[name]), rel=1e-5), (name, d)
    last = anchors.table(losses.on, losses.tokens)[-1]
    assert last["segment"] == "2 on" and last["tokens"] == sum(max(n - 1 - 2 * S, 0) for n in LENGTHS)


def test_command_prints_and_writes_them(tmp_path, capsys):
    make_dataset(tmp_path / "shards", LENGTHS, vocab_size=VOCABULARY)
    model_of().float().save_pretrained(tmp_path / "model")
    words = ["segments", tmp_path / "model", "--dataset", tmp_path / "shards", "--out", tmp_path / "out.json"]
    assert main([*map(str, words), "--anchors"]) == 0
    assert "continuous cache" not in capsys.readouterr().err
    table = json.loads((tmp_path / "out.json").read_text())["anchors"]
    assert [row["segment"] for row in table] == ["2-3", "4-7", "2 on"]
    assert {"cache", "cache_se", "head", "unigram"} <= set(table[0])
