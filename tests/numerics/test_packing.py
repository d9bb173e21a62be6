"""Documents that collators pack into one row are as if alone, however the collator tells where they begin."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from infini_train.model import InfiniCache, configuration
from tests.helpers.models import OUTPUT, VOCAB, S, build
from tests.helpers.reference import document_logits

# Angles of RoPE are float32, and a document that begins inside a segment has other ones than alone.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
LENGTHS = (2 * S + 1, 3, S, 2, 3, 3 * S - 1)  # documents begin anywhere in a segment


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Output memories are written twice in a segment."""
    monkeypatch.setattr(configuration, "OUTPUT_CHUNK", S // 2)


@pytest.fixture(params=[("paper-delta", None), ("selective-delta", 9), ("paper-linear" + OUTPUT, None)], ids=str)
def model(request):
    memory, sliding = request.param
    return build(memory, sliding_window=sliding).eval()


def documents(*lengths: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(VOCAB, (n,)) for n in lengths]


def alone(model, texts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([document_logits(model, text) for text in texts])


@pytest.mark.parametrize(
    "told_by",
    [{}, {"seq_idx": True}, {"flash_attn_kwargs": True}, {"seq_idx": True, "position_ids": False}],
    ids=str,
)
def test_flattened_documents_are_as_if_alone(model, told_by):
    texts = documents(*LENGTHS)
    collate = DataCollatorWithFlattening(**{f"return_{name}": value for name, value in told_by.items()})
    batch = collate([{"input_ids": text} for text in texts])
    out = model(**batch)
    torch.testing.assert_close(out.logits[0], alone(model, texts), **CLOSE)
    losses = [
        torch.nn.functional.cross_entropy(model(text[None]).logits[0, :-1], text[1:], reduction="none")
        for text in texts
    ]
    assert out.loss.item() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)  # transformers: in float32


def test_lengths_alone_and_several_rows(model):
    """`cu_seq_lens_q` counts through all rows."""
    texts = documents(S + 1, 2 * S - 1, 3 * S)
    ids = torch.cat(texts).view(2, 3 * S)
    ends = torch.tensor([0, S + 1, 3 * S, 6 * S], dtype=torch.int32)
    found = model(ids, cu_seq_lens_q=ends).logits
    torch.testing.assert_close(found.flatten(0, 1), alone(model, texts), **CLOSE)


def test_packed_rows_with_padding(model):
    """Rows of packed documents, of one document, padded on either side, between documents and inside of one."""
    texts = documents(S + 2, 4, 2 * S, 3)
    length = 2 * S + 4
    ids, mask = torch.full((3, length), 7), torch.zeros(3, length, dtype=torch.long)
    positions = torch.zeros(3, length, dtype=torch.long)
    places = [(0, range(2, S + 4)), (0, [S + 5, S + 6, S + 8, S + 9]), (1, range(4, 2 * S + 4)), (2, range(3))]
    for (row, own), text in zip(places, texts, strict=True):
        own = list(own)
        ids[row, own], mask[row, own], positions[row, own] = text, 1, torch.arange(len(text))
    out = model(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
    if model.lm_head.memory is None:
        torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    first = model.model.embed_tokens(ids)
    for (row, own), text in zip(places, texts, strict=True):
        torch.testing.assert_close(out.logits[row, list(own)], document_logits(model, text), **CLOSE)
        assert torch.equal(out.hidden_states[0][row, list(own)], first[row, list(own)])


def test_positions_of_one_document_change_nothing(model):
    """The position_ids that clients pass for padded prompts and for tokens after those in a cache."""
    ids, mask = torch.stack(documents(3 * S, 3 * S)), torch.ones(2, 3 * S, dtype=torch.long)
    mask[0, : S + 1] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits, expected)
    cache, first = InfiniCache(model.config), 2 * S + 1
    for part in (slice(0, first), slice(first, None)):
        seen = mask[:, : part.stop]
        found = model(ids[:, part], attention_mask=seen, position_ids=positions[:, part], past_key_values=cache)
        torch.testing.assert_close(found.logits[mask[:, part] > 0], expected[:, part][mask[:, part] > 0])
    options = {"max_new_tokens": 2 * S, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(ids, attention_mask=mask, **options)
    given = model.generate(ids, attention_mask=mask, position_ids=positions, **options)
    assert torch.equal(given, made)
    beams = model.generate(ids, attention_mask=mask, position_ids=positions, num_beams=2, **options)
    assert torch.equal(beams, model.generate(ids, attention_mask=mask, num_beams=2, **options))


def test_other_meanings_are_refused(model):
    ids = torch.stack(documents(S, S))
    count, zeros = torch.arange(S)[None], torch.zeros(2, S, dtype=torch.long)
    other = torch.tensor([[0, 0, 0, 1, 1, 1]])
    cache = model(ids, use_cache=True).past_key_values
    for options, message in (
        ({"position_ids": count + 2}, r"position_ids: found 2 in row 0, column 0, expected 0, which continues"),
        ({"position_ids": count * 2}, "position_ids: found 2 in row 0, column 1, expected 1"),
        ({"position_ids": count.flip(1)}, "position_ids: found 5 in row 0, column 0"),
        ({"position_ids": count[:, 1:]}, r"position_ids: found shape \(1, 5\), expected \(2, 6\)"),
        ({"position_ids": count.expand(3, 1, -1)}, r"position_ids: found shape \(3, 1, 6\)"),
        (
            {"position_ids": count + S + 1, "past_key_values": cache},
            f"found {S + 1} in row 0, column 0, expected {S}",
        ),
        ({"position_ids": count, "past_key_values": cache}, "several documents in a row, expected one with a cache"),
        ({"position_ids": zeros, "use_cache": True}, "several documents in a row, expected one with a cache"),
        ({"position_ids": count, "seq_idx": other}, "position_ids and seq_idx: only one of them begins a document"),
        ({"position_ids": count, "memory": model.init_memory(2)}, "starts and memory cannot be combined with pos"),
        ({"seq_idx": zeros[:, 1:]}, r"seq_idx: found shape \(2, 5\)"),
        ({"cu_seq_lens_q": torch.tensor([0, S])}, rf"cu_seq_lens_q: found \[0, {S}\], expected numbers that rise"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 2 * S])}, "expected one of them at the start of every row"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, **options)
