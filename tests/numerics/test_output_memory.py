"""The output memory: losses, gradients and writes against a loop over tokens, and what its file promises."""

import pytest
import torch
import torch.nn.functional as F

from infini_train.model import InfiniConfig, configuration, output_memory
from infini_train.model.output_memory import CLIP, DECAY, NAME
from tests.helpers.models import OUTPUT, STARTS, VOCAB, S, build, rows, run_windows
from tests.helpers.reference import row_logits

MODEL = "selective-delta" + OUTPUT


@pytest.fixture(params=[3, S])
def chunk(request, monkeypatch) -> int:
    """Chunks shorter than a segment, and as long."""
    monkeypatch.setattr(configuration, "OUTPUT_CHUNK", request.param)
    return request.param


def labels_of(ids, starts):
    """The tokens that follow, and none where the next token begins a document, or is not known."""
    following, begins = F.pad(ids[:, 1:], (0, 1), value=-100), F.pad(starts[:, 1:], (0, 1))
    return following.masked_fill(begins, -100)


@pytest.mark.parametrize("case", STARTS)
@pytest.mark.parametrize("window", [24, 12])
def test_losses_equal_loop(chunk, case, window):
    model = build(MODEL)
    ids, starts = rows(case)
    labels = labels_of(ids, starts)
    labels[0, 4] = -100  # not scored, but written all the same
    memory, total, each = None, 0, []
    for t in range(0, ids.shape[1], window):
        part = slice(t, t + window)
        out = model.token_losses(ids[:, part], labels[:, part], starts[:, part], memory)
        total, memory = total + out.total, [{k: x.detach() for k, x in state.items()} for state in out.memory]
        each.append(out.losses)
    gradients = torch.autograd.grad(total, list(model.parameters()))

    logits = torch.stack([row_logits(model, i, s, window) for i, s in zip(ids, starts, strict=True)])
    theirs = F.cross_entropy(logits.mT, labels, reduction="none")
    torch.testing.assert_close(torch.cat(each, 1), theirs.detach(), rtol=1e-10, atol=1e-10)
    for ours, reference in zip(gradients, torch.autograd.grad(theirs.sum(), list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run_windows(model, ids, starts, window), logits, rtol=1e-10, atol=1e-10)


def test_many_rows_are_read_in_turn(monkeypatch):
    """More rows than whose logits may exist at a time: as row by row."""
    monkeypatch.setattr(output_memory, "LOSS_CHUNK", 2 * S)
    model, ids = build(MODEL), torch.randint(VOCAB, (5, 4 * S))
    starts = torch.rand(ids.shape) < 0.1
    together = model.token_losses(ids, labels_of(ids, starts), starts)
    for row in range(len(ids)):
        one = slice(row, row + 1)
        alone = model.token_losses(ids[one], labels_of(ids[one], starts[one]), starts[one])
        torch.testing.assert_close(together.losses[one], alone.losses)
        torch.testing.assert_close(together.memory[-1][NAME][one], alone.memory[-1][NAME])


def test_without_reading_it_is_the_linear_head():
    model, (ids, starts) = build(MODEL), rows("anywhere")
    labels, plain = labels_of(ids, starts), build("selective-delta")
    plain.load_state_dict(model.state_dict(), strict=False)
    before = model.init_memory(len(ids))
    before[-1][NAME].normal_()
    with model.memory_off(), plain.memory_off():
        off, expected = model.token_losses(ids, labels, starts, before), plain.token_losses(ids, labels, starts)
        torch.testing.assert_close(off.losses, expected.losses, rtol=0, atol=0)
        torch.testing.assert_close(model(ids, starts=starts).logits, plain(ids, starts=starts).logits)
    assert off.memory[-1] is before[-1]
    assert not torch.equal(model.token_losses(ids, labels, starts, before).losses, expected.losses)


def test_bounded():
    """The same surprising token again and again, however wrong the model is, moves no row beyond the bound."""
    model = build(MODEL)
    ids, memory = torch.full((1, S), 3), model.init_memory(1)
    with torch.no_grad():
        model.lm_head.weight[3] = -1e3 * model.model(ids, by_head=True).last_hidden_state[0, -1]
        for _ in range(300):
            memory = model.token_losses(ids, ids, memory=memory).memory
            ids = ids.flip(1) if _ % 2 else torch.randint(VOCAB, (1, S))
            assert memory[-1][NAME].norm(dim=-1).max() <= CLIP / (1 - DECAY)


def test_it_learns_the_documents_words():
    """A document of few tokens in random order: the loss falls far below that of the same model without it."""
    torch.manual_seed(0)
    model = build("paper-linear" + OUTPUT, dtype=torch.float32)
    ids = torch.randint(4, (2, 100 * S)) * 7
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    losses = model.token_losses(ids, labels).losses
    with model.memory_off():
        gain = (model.token_losses(ids, labels).losses - losses).unflatten(1, (-1, 10 * S)).mean(-1)
    assert gain.min() > 0.2 and gain.mean() > 0.5


def test_half_precision():
    model, ids = build(MODEL, dtype=torch.float32), torch.randint(VOCAB, (2, 4 * S))
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    exact = model.token_losses(ids, labels)
    with torch.autocast("cpu", torch.bfloat16):
        out = model.token_losses(ids, labels)
    assert out.losses.dtype == out.memory[-1][NAME].dtype == torch.float32
    torch.testing.assert_close(out.total, exact.total, rtol=0.02, atol=0)
    torch.testing.assert_close(out.memory[-1][NAME], exact.memory[-1][NAME], rtol=0.1, atol=0.1)


def test_what_is_carried_keeps_nothing_else():
    ids, starts = rows("anywhere")
    (output,) = build(MODEL).token_losses(ids, labels_of(ids, starts), starts).memory[-1].values()
    assert output.untyped_storage().nbytes() == output.nbytes and not output.requires_grad


def test_bad_input():
    with pytest.raises(ValueError, match="output_memory_dim: found 0, expected at least 1"):
        InfiniConfig(output_memory_dim=0)
    with pytest.raises(ValueError, match="segment_length: found 200, expected at most 128 or a multiple of it"):
        InfiniConfig(output_memory_dim=8, segment_length=200)
    model, ids = build(MODEL), torch.zeros(1, S + 1, dtype=torch.long)
    with pytest.raises(ValueError, match=f"input_ids: found {S + 1} tokens, expected a multiple of {S}"):
        model.token_losses(ids, ids)
    with pytest.raises(ValueError, match=r"inputs_embeds: .* needs input_ids"):
        model(inputs_embeds=torch.zeros(1, S, 16, dtype=torch.float64))
