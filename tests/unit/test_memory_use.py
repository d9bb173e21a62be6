"""What heads take from their memories, against the reference's outputs with gates wide open, and shut."""

import io
import json

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from infini_train import plots
from infini_train.data.index import DatasetIndex
from infini_train.evaluation.__main__ import main
from infini_train.evaluation.segments import segment_losses
from infini_train.evaluation.subject import load
from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.model.configuration import MEMORY_RULES
from tests.helpers.datasets import make_dataset
from tests.helpers.reference import attention, rms_norm
from tests.helpers.runs import fit

S, LAYERS, HEADS = 8, 2, 4
LENGTHS = [30, 2, 45, 8, 17, 9]


def make_model(memory: str) -> InfiniForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": 4}
    model = InfiniForCausalLM(InfiniConfig(**sizes, **heads, segment_length=S, memory=memory, initializer_range=0.5))
    for name, p in model.named_parameters():
        if "gate" in name.split(".")[-1]:  # beta, and selective-delta's gate_weight
            torch.nn.init.normal_(p)
    return model.double().eval()


def heads_of(layer, config, x: Tensor, pieces, beta: float) -> Tensor:
    """The heads' outputs [t, heads, d] by the reference, if all gates had this beta whatever their input."""
    saved = {name: p.clone() for name, p in layer.named_parameters()}
    layer.gate.fill_(beta)
    layer.o_proj.weight.copy_(torch.eye(len(layer.o_proj.weight)))
    if config.memory == "selective-delta":
        layer.rule.gate_weight.zero_()
    out = attention(layer, config, x, pieces, set())
    layer.load_state_dict(saved)
    return out.unflatten(1, (HEADS, -1))


def first_token(model) -> int:
    """The first of a document that finds something: with the paper's rules, in its second segment."""
    return 0 if model.config.memory == "selective-delta" else S


@torch.no_grad()
def expected(model, documents) -> tuple[Tensor, Tensor]:
    """Shares and ratios of norms, token by token, from the first one on that finds something."""
    config, found, first = model.config, [[] for _ in range(LAYERS)], first_token(model)
    for tokens in documents:
        x = model.model.embed_tokens.weight[torch.from_numpy(tokens.astype("int64"))]
        pieces = [(t, 0) for t in range(0, len(x), S)]
        for i, layer in enumerate(model.model.layers):
            h = rms_norm(x, layer.input_layernorm.weight, config.rms_norm_eps)
            attend = layer.self_attn
            beta = attend.gate + (h @ attend.rule.gate_weight.T if config.memory == "selective-delta" else 0)
            read, local = (heads_of(attend, config, h, pieces, b).norm(dim=-1) for b in (1e3, -1e3))
            share = torch.sigmoid(beta).expand(len(x), HEADS)
            found[i].append(torch.stack((share, read, local))[:, first:])
            x = x + attention(attend, config, h, pieces, set())
            x = x + layer.mlp(rms_norm(x, layer.post_attention_layernorm.weight, config.rms_norm_eps))
    share, read, local = torch.stack([torch.cat(parts, 1).mean(1) for parts in found], 1)
    return share, read / local


@pytest.mark.parametrize("memory", MEMORY_RULES)
def test_shares_and_norms_equal_the_reference(tmp_path, memory):
    documents = make_dataset(tmp_path / "shards", LENGTHS, vocab_size=40)
    model = make_model(memory)
    _, use, _ = segment_losses(model, DatasetIndex.load(tmp_path / "shards"), rows=3)
    assert use.sums[0].tolist() == [[sum(max(0, n - first_token(model)) for n in LENGTHS)] * HEADS] * LAYERS
    for found, wanted in zip(use.shares_and_norms(), expected(model, documents), strict=True):
        assert found.tolist() == [pytest.approx(row, rel=1e-5) for row in wanted.tolist()]
        assert wanted.std() > 1e-2  # heads differ
    assert not any(m._forward_hooks for m in model.modules())


def test_command(tmp_path, capsys, monkeypatch):
    """The table and the JSON; nothing where there is one segment only."""
    pytest.importorskip("matplotlib")
    saved = []
    monkeypatch.setattr(plots, "save", lambda figure, path: saved.append(figure))
    documents = make_dataset(tmp_path / "shards", LENGTHS, vocab_size=40)
    model = make_model("paper-delta")
    model.save_pretrained(tmp_path / "model")
    given = ["segments", str(tmp_path / "model"), "--dataset", str(tmp_path / "shards"), "--dtype", "float64"]

    def run(name: str, *extra: str):
        out = tmp_path / f"{name}.json"
        assert main([*given, *extra, "--out", str(out), "--plot", str(tmp_path / "a.png")]) == 0
        return json.loads(out.read_text())["heads"], capsys.readouterr().out

    heads, shown = run("all")
    wanted = dict(zip(("share", "read_norm"), expected(model, documents), strict=True))
    for image, (name, table) in zip((axes.images[0] for axes in saved[0].axes[2:4]), wanted.items(), strict=True):
        assert heads[name] == [pytest.approx(row, rel=1e-5) for row in table.tolist()]
        assert image.get_array().tolist() == heads[name]
        for row in heads[name]:
            assert " │ ".join(f"{value:.2f}" for value in row) in shown

    assert run("short", "--max-tokens", str(S))[0] is None
    assert len(saved[1].axes) == 2


def test_validation_logs_them(tmp_path):
    """As the evaluation of the same weights finds, though it reads other windows without padding."""
    make_dataset(tmp_path / "train", [300, 45, 120, 200], vocab_size=40)
    make_dataset(tmp_path / "valid", [70, 2, 45, 33, 8], vocab_size=40)
    options = [
        "--data.validation",
        tmp_path / "valid",
        "--model.memory",
        "selective-delta",
        "--trainer.max_steps",
        "4",
    ]
    options += ["--trainer.val_check_interval", "8", "--model.optimizer.gate_lr", "0.3"]
    run = fit(tmp_path / "run", tmp_path / "train", *map(str, options))
    assert run.code == 0, run.err
    index = DatasetIndex.load(tmp_path / "valid")
    model = load(tmp_path / "run" / "checkpoints" / "step-00000004", index, "cpu", torch.float32)
    _, use, _ = segment_losses(model, index)
    share, norm = use.shares_and_norms()
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0}).Reload()
    for tag, wanted in {"val/memory_share": share, "val/memory_read_norm": norm}.items():
        (point,) = board.Scalars(tag)
        assert (point.step, point.value) == (4, pytest.approx(wanted.mean().item(), rel=1e-4))
    image = pytest.importorskip("PIL.Image")
    (drawn,) = board.Images("heads/memory_share")
    pixels = np.array(image.open(io.BytesIO(drawn.encoded_image_string)).convert("L"))[8::16, 8::16]
    assert pixels.tolist() == [pytest.approx(row, abs=1.01) for row in (255 * share).tolist()]
