"""What transformers lets a user ask of any model works, or gives one clear error."""

import pytest
import torch
from transformers import GenerationConfig

from infini_train.model import InfiniCache
from tests.helpers.models import OUTPUT, S, build

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
def test_an_exported_graph_of_any_number_of_segments(memory, window):
    """Texts of other lengths than the graph was traced with, filled up to whole segments with any token."""
    model = build(memory, torch.float32, sliding_window=window).eval()
    segments = S * torch.export.Dim("segments", min=3, max=1000)
    ids = torch.randint(3, 29, (1, 9 * S - 2), generator=torch.Generator().manual_seed(2))
    traced = torch.export.export(
        model, (), {"input_ids": ids[:, : 5 * S]}, dynamic_shapes={"input_ids": {1: segments}}, strict=False
    )
    for text in (ids[:, : 3 * S], ids):
        whole = torch.nn.functional.pad(text, (0, -text.shape[1] % S))
        found = traced.module()(input_ids=whole).logits[:, : text.shape[1]]
        torch.testing.assert_close(found, model(text, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_an_output_memory_cannot_be_exported():
    model = build("paper-linear" + OUTPUT, torch.float32).eval()
    with pytest.raises(ValueError, match=r"torch\.export: found an output memory, .* expected none"):
        torch.export.export(model, (), {"input_ids": torch.ones(1, 2 * S, dtype=torch.long)}, strict=False)


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
