"""What transformers lets a user ask of any model works, or gives one clear error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from infini_train.model import InfiniCache, InfiniForCausalLM
from tests.helpers.models import OUTPUT, VOCAB, S, build
from tests.helpers.reference import document_logits

REPOSITORY = Path(__file__).parents[2]
LOADED = """
import sys
import torch
import infini_train.hf  # the operators of the model
texts, expected = torch.load(sys.argv[2])
graph = torch.export.load(sys.argv[1]).module()
for ids, logits in zip(texts, expected, strict=True):
    torch.testing.assert_close(graph(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-5)
print("the same")
"""
OPTIONS = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return build("selective-delta", torch.float32).eval()


@pytest.fixture
def padded():
    """Ids and a mask, [3, 3 S + 2]: padding on the left, on the right and none."""
    torch.manual_seed(1)
    mask = torch.ones(3, 3 * S + 2, dtype=torch.long)
    mask[0, : S + 1], mask[1, -2:] = 0, 0
    return torch.randint(3, 29, mask.shape), mask


def test_a_mask_in_one_graph(padded):
    """torch.compile without graph breaks, and torch.export, which serves other values of the mask, too."""
    model, (ids, mask) = build("paper-linear", torch.float32).eval(), padded
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, attention_mask=mask).logits[mask > 0], expected[mask > 0])
    exported = torch.export.export(model, (), {"input_ids": ids, "attention_mask": mask.flip(1)}, strict=False)
    found = exported.module()(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(found.logits[mask > 0], expected[mask > 0])


@pytest.mark.parametrize(("memory", "window"), [("paper-delta", 2 * S), ("selective-delta", None)])
def test_an_exported_graph_of_any_number_of_segments(tmp_path, memory, window):
    """Texts of other lengths than the graph was traced with, filled up to whole segments with any token; also in
    another process, which has the graph alone."""
    model = build(memory, torch.float32, sliding_window=window).eval()
    segments = S * torch.export.Dim("segments", min=3, max=1000)
    ids = torch.randint(3, 29, (1, 9 * S - 2), generator=torch.Generator().manual_seed(2))
    traced = torch.export.export(
        model, (), {"input_ids": ids[:, : 5 * S]}, dynamic_shapes={"input_ids": {1: segments}}, strict=False
    )
    texts, expected = [], []
    for text in (ids[:, : 3 * S], ids):
        whole = torch.nn.functional.pad(text, (0, -text.shape[1] % S))
        found = traced.module()(input_ids=whole).logits
        alone = model(text, use_cache=False).logits
        torch.testing.assert_close(found[:, : text.shape[1]], alone, rtol=1e-4, atol=1e-5)
        texts.append(whole)
        expected.append(found.detach())
    graph, numbers = tmp_path / "graph.pt2", tmp_path / "numbers.pt"
    torch.export.save(traced, graph)
    torch.save((texts, expected), numbers)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", LOADED, graph, numbers]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.stdout == "the same\n", done.stderr[-3000:]


def test_an_output_memory_cannot_be_exported(tmp_path):
    """Loaded without it, as the error says, the model can."""
    model, ids = build("paper-linear" + OUTPUT, torch.float32).eval(), torch.arange(2 * S)[None]
    with pytest.raises(ValueError, match=r"torch\.export: found an output memory, .* output_memory_dim=None"):
        torch.export.export(model, (), {"input_ids": ids}, strict=False)
    model.save_pretrained(tmp_path)
    plain = InfiniForCausalLM.from_pretrained(tmp_path, output_memory_dim=None).eval()
    traced = torch.export.export(plain, (), {"input_ids": ids}, strict=False).module()
    first_chunk = model(ids, use_cache=False).logits[:, :S]  # there is nothing to read from the output memory yet
    torch.testing.assert_close(traced(input_ids=ids).logits[:, :S], first_chunk)
    torch.testing.assert_close(traced(input_ids=ids).logits, plain(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_shapes_on_the_meta_device(padded):
    ids, mask = (x.to("meta") for x in padded)
    model = build("selective-delta", torch.float32).to("meta").eval()
    for options in ({}, {"use_cache": False}, {"attention_mask": mask}, {"position_ids": ids}):
        assert model(ids, **options).logits.shape == (*ids.shape, 29)


def test_gradient_checkpointing(padded):
    """With `use_cache=True` as without: the same loss and gradients, no cache, and never one that is given."""
    ids, results = padded[0], []
    for options in ({}, {"use_cache": True}):
        model = build("paper-delta", torch.float32).train()
        if options:
            model.gradient_checkpointing_enable()
        out = model(ids, labels=ids, **options)
        assert out.past_key_values is None
        out.loss.backward()
        results.append([out.loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results)
    with pytest.raises(ValueError, match="past_key_values: found a cache, expected none with gradient checkpointing"):
        model(ids, past_key_values=InfiniCache(model.config))


@pytest.mark.parametrize("kind", ["hybrid", "static", "dynamic", "offloaded", "quantized", "paged"])
def test_other_caches_are_refused(model, padded, kind):
    with pytest.raises(ValueError, match=f"cache_implementation: found '{kind}'|continuous batching"):
        model.generate(padded[0], cache_implementation=kind, **OPTIONS)
    if kind != "paged":
        with pytest.raises(ValueError, match=f"cache_implementation: found '{kind}'"):
            model.generate(padded[0], GenerationConfig(cache_implementation=kind, **OPTIONS))


def test_attention_weights_and_continuous_batching_are_refused(model, padded):
    for call in (
        lambda: model(padded[0], output_attentions=True),
        lambda: model.generate(padded[0], output_attentions=True, return_dict_in_generate=True, **OPTIONS),
    ):
        with pytest.raises(ValueError, match="output_attentions: found True, expected False"):
            call()
    with pytest.raises(ValueError, match="continuous batching: found an Infini model"):
        model.generate_batch([[3, 4, 5]], max_new_tokens=2)
    assert not model.is_backend_compatible()  # which vLLM and SGLang ask before they replace the attention


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("memory", ["paper-linear", "selective-delta" + OUTPUT])
def test_a_resized_vocabulary(tmp_path, memory, tied):
    """Old tokens keep their weights, the model computes what the loop does, and it is saved whole."""
    before, model = (build(memory, tie_word_embeddings=tied).eval() for _ in range(2))
    model.resize_token_embeddings(VOCAB + 3)
    old, new = before.state_dict(), model.state_dict()
    assert old.keys() == new.keys() and model.config.vocab_size == VOCAB + 3
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for name, value in old.items():
        assert torch.equal(new[name][: len(value)], value), name
    text = torch.randint(VOCAB + 3, (4 * S + 1,), generator=torch.Generator().manual_seed(2))
    found, expected = model(text[None]).logits[0], document_logits(model, text)
    assert found.shape == (len(text), VOCAB + 3)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    whole = text[None, : 4 * S]
    losses = model.token_losses(whole, whole.roll(-1)).losses[0, :-1]
    nats = torch.nn.functional.cross_entropy(expected[: 4 * S - 1], text[1 : 4 * S], reduction="none")
    torch.testing.assert_close(losses, nats, rtol=1e-9, atol=1e-9)
    made = [model.generate(text[None], use_cache=cache, **OPTIONS | {"max_new_tokens": S}) for cache in (True, False)]
    assert torch.equal(*made)
    model.save_pretrained(tmp_path)
    again = InfiniForCausalLM.from_pretrained(tmp_path).state_dict()
    assert again.keys() == new.keys() and all(torch.equal(again[name], new[name]) for name in new)


def test_rows_that_end_in_padding_are_not_continued(model, padded):
    """The logits of their last column would be those of padding."""
    ids, mask = padded
    with pytest.raises(ValueError, match="attention_mask: found padding at the end of a row, expected it at"):
        model.generate(ids, attention_mask=mask, **OPTIONS)


def test_the_loss_of_padded_rows_is_that_of_each_alone(padded):
    """Also on the left, where the label of a row's first token follows padding."""
    (ids, mask), model = padded, build("selective-delta", torch.float64).eval()
    labels = ids.where(mask > 0, -100)
    alone = [model(row[real > 0][None]).logits[0, :-1] for row, real in zip(ids, mask, strict=True)]
    following = [row[real > 0][1:] for row, real in zip(ids, mask, strict=True)]
    expected = torch.nn.functional.cross_entropy(torch.cat(alone).float(), torch.cat(following))
    torch.testing.assert_close(model(ids, attention_mask=mask, labels=labels).loss, expected)


@pytest.mark.parametrize(("rows", "tokens"), [(0, 3), (2, 0)])
def test_nothing_to_read_is_refused(model, rows, tokens):
    with pytest.raises(ValueError, match=f"found {rows} rows of {tokens} tokens, expected at least one of each"):
        model(torch.ones(rows, tokens, dtype=torch.long))


def test_a_decoder_whose_head_remembers_is_not_called_alone(padded):
    """Clients that compute losses from hidden states and output weights would leave the output memory out."""
    model = build("paper-linear" + OUTPUT, torch.float32).eval()
    for call in (model.model, model.base_model, model.get_decoder()):
        with pytest.raises(ValueError, match=r"hidden states: found an output memory, .* output_memory_dim=None"):
            call(padded[0])
