"""The parallel window against the segment-by-segment loop, in fp64 and fp32 (docs/architecture.md, Model)."""

import pytest
import torch
import torch.nn.functional as F

from infini_train.model import InfiniConfig
from infini_train.model.memory_rule import MemoryRule
from tests.helpers.models import MODELS, NO_BASE, RULES, SLIDING, STARTS, VOCAB, S, build, rows, run_windows
from tests.helpers.reference import document_logits, row_logits


@pytest.mark.parametrize(
    ("memory", "sliding", "dtype", "tolerance"),
    [
        *((*model, torch.float64, 1e-10) for model in MODELS),
        *((rule, None, torch.float32, 1e-4) for rule in RULES),
        ("selective-delta", S, torch.float32, 1e-4),
    ],
)
@pytest.mark.parametrize("case", STARTS)
@pytest.mark.parametrize("window", [24, 12, 6])
def test_window_equals_loop(memory, sliding, case, window, dtype, tolerance):
    model = build(memory, dtype, sliding_window=sliding)
    ids, starts = rows(case)
    weights = torch.randn(*ids.shape, VOCAB, dtype=torch.float64)

    ours = run_windows(model, ids, starts, window)
    # With one segment a window no loss reaches what only writes use.
    unused = {"allow_unused": True, "materialize_grads": True} if window == S else {}
    ours_grads = torch.autograd.grad((ours * weights.to(dtype)).sum(), list(model.parameters()), **unused)
    twin = build(memory, sliding_window=sliding)  # the same values in fp64
    twin.load_state_dict(model.state_dict())
    theirs = torch.stack([row_logits(twin, i, s, window) for i, s in zip(ids, starts, strict=True)])
    theirs_grads = torch.autograd.grad((theirs * weights).sum(), list(twin.parameters()), allow_unused=True)

    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())
    for (name, _), mine, reference in zip(model.named_parameters(), ours_grads, theirs_grads, strict=True):
        reference = torch.zeros_like(mine) if reference is None else reference  # no memory read: no gate gradient
        error = (mine.double() - reference).abs().max() / theirs_grads[0].abs().max()
        assert error < tolerance, f"{name}: gradient off by {error}"


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (8, 2)])
@pytest.mark.parametrize("tie", [True, False])
def test_head_layouts(heads, kv_heads, tie):
    model = build("paper-delta", heads=heads, kv_heads=kv_heads, tie_word_embeddings=tie)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    ids, starts = rows("anywhere")
    ours = model(ids, starts=starts).logits
    theirs = torch.stack([row_logits(model, i, s) for i, s in zip(ids, starts, strict=True)])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [1, 5, 6, 7, 20])
@pytest.mark.parametrize("sliding", [None, *SLIDING])
def test_any_length(length, sliding):
    """A text of any length, as evaluation passes it: without starts, the last segment incomplete."""
    model = build("paper-linear", sliding_window=sliding)
    ids = rows("one document")[0][0, :length]
    out = model(ids[None])
    torch.testing.assert_close(out.logits[0], document_logits(model, ids), rtol=1e-10, atol=1e-10)
    assert (out.memory is None) == (length % S != 0)


@pytest.mark.parametrize(("memory", "sliding"), MODELS)
def test_causal(memory, sliding):
    """No output before token t moves when token t does, to the bit."""
    model = build(memory, sliding_window=sliding)
    ids, starts = rows("anywhere")
    before = model(ids, starts=starts).logits
    for t in range(ids.shape[1]):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        after = model(changed, starts=starts).logits
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("memory", RULES)
def test_reach_of_gradients(memory):
    """The last segment's loss reaches segment 1 of its window, and nothing before the window."""
    model = build(memory)
    ids = rows("one document")[0]
    first = model.model.embed_tokens(ids).detach().requires_grad_()
    carried = model(inputs_embeds=first).memory
    second = model.model.embed_tokens(ids).detach().requires_grad_()
    detached = [{k: v.detach() for k, v in layer.items()} for layer in carried]
    model(inputs_embeds=second, memory=detached).logits[:, -1].sum().backward()
    assert (second.grad[:, :S].abs().amax(dim=(1, 2)) > 0).all()
    assert first.grad is None


def test_documents_do_not_meet():
    """A document's logits do not move, to rounding, when its neighbours in the row do, and rows do not mix."""
    model = build("paper-delta")
    ids, starts = rows("anywhere")
    other = torch.randint(VOCAB, ids.shape)
    mine = torch.zeros_like(starts)
    mine[0, 9:], mine[1, 5:13], mine[2, 3:17] = True, True, True
    kept = model(torch.where(mine, ids, other), starts=starts).logits[mine]
    torch.testing.assert_close(model(ids, starts=starts).logits[mine], kept, rtol=1e-12, atol=1e-12)


def test_carried_memory_of_another_document_is_not_read():
    """A non-finite memory left by another document must not reach a row that begins a new one."""
    model = build("paper-linear")
    ids, starts = rows("one document")
    fresh = model(ids, starts=starts)
    poisoned = [{k: torch.full_like(v, 3e300) for k, v in layer.items()} for layer in model.init_memory(len(ids))]
    torch.testing.assert_close(model(ids, starts=starts, memory=poisoned).logits, fresh.logits, rtol=0, atol=0)


def test_empty_memory_is_llama():
    """On the first segment the model is transformers' own Llama with the same weights, at any gate."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = build("paper-linear", dtype=torch.float32)
    fields = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    llama = LlamaForCausalLM(LlamaConfig(**fields))
    missing, unexpected = llama.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all(name.endswith("self_attn.gate") for name in unexpected)
    ids = rows("one document")[0][:, :S]
    torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory", RULES)
def test_memory_is_float32_and_finite_for_extreme_inputs(memory):
    """Keys and queries so negative that every feature underflows, and so large that half precision would overflow."""
    model = build(memory, dtype=torch.bfloat16)
    ids, starts = rows("one document")
    for scale in (1e-3, 1.0, 100.0):
        for sign in (1, -1):
            twin = build(memory, dtype=torch.bfloat16)
            with torch.no_grad():
                for layer in twin.model.layers:
                    layer.self_attn.k_proj.weight.copy_(sign * scale * layer.self_attn.k_proj.weight)
                    layer.self_attn.q_proj.weight.copy_(scale * layer.self_attn.q_proj.weight)
            out = twin(ids, starts=starts)
            out.logits.float().sum().backward()
            assert all(v.dtype == torch.float32 and v.isfinite().all() for m in out.memory for v in m.values())
            assert all(p.grad.isfinite().all() for p in twin.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        out = model.float()(ids, starts=starts)
    assert all(v.dtype == torch.float32 for m in out.memory for v in m.values())


def test_gate_has_gradient_and_direction():
    """sigmoid(beta) is the memory's share: at minus infinity local attention stands alone; gradients reach it."""
    model = build("paper-linear")
    ids = rows("one document")[0]
    F.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten()).backward()
    assert all((layer.self_attn.gate.grad.abs() > 0).all() for layer in model.model.layers)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.gate.fill_(-60.0)
        closed = model(ids).logits
        with model.memory_off():
            torch.testing.assert_close(model(ids).logits, closed, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(closed[:, S : 2 * S], model(ids[:, S : 2 * S]).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sliding", SLIDING)
@torch.no_grad()
def test_memory_off_leaves_the_segment_before_in_sight(sliding):
    """The memory is off, and local attention as it is: what a gate that is shut leaves."""
    model = build("paper-linear", sliding_window=sliding)
    ids, starts = rows("anywhere")
    with model.memory_off():
        off = model(ids, starts=starts).logits
    for layer in model.model.layers:
        layer.self_attn.gate.fill_(-60.0)
    torch.testing.assert_close(off, model(ids, starts=starts).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("memory", "sliding"), MODELS)
def test_activation_checkpointing(memory, sliding):
    """Checkpointed layers give the same gradients, the memory's path across segments and windows included."""
    ids, starts = rows("anywhere")
    grads = []
    for checkpointed in (False, True):
        model = build(memory, sliding_window=sliding).train()
        if checkpointed:
            model.activation_checkpointing_enable()
        run_windows(model, ids, starts, 12).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("memory", "sliding"), MODELS)
@pytest.mark.parametrize("case", ["one document", "anywhere"])
def test_what_is_carried_keeps_nothing_else(memory, sliding, case):
    """Lanes keep a memory each: as a view it would keep the memories before all segments of the window."""
    ids, starts = rows(case)
    for state in build(memory, sliding_window=sliding).train().token_losses(ids, ids, starts).memory:
        for x in state.values():
            assert x.untyped_storage().nbytes() <= 2 * x.nbytes  # the convolution's inputs: those before them, too


def test_bad_input():
    model = build("paper-linear")
    ids, starts = rows("one document")
    with pytest.raises(ValueError, match="starts: found shape"):
        model(ids, starts=starts[:, :-1])
    with pytest.raises(ValueError, match=r"memory: found 'x'.*num_key_value_heads: found 3"):
        InfiniConfig(memory="x", num_attention_heads=4, num_key_value_heads=3)


@pytest.mark.parametrize(
    ("memory", "as_on_gpu", "sliding"),
    [
        *((rule, False, None) for rule in RULES),
        ("selective-delta", True, None),
        ("selective-delta" + NO_BASE, False, S),
    ],
)
@pytest.mark.parametrize("case", ["one document", "anywhere"])
def test_compiled_layer_is_one_graph(monkeypatch, memory, case, as_on_gpu, sliding):
    """Forward and backward, as torch.compile traces them (without Inductor, which would take minutes)."""
    monkeypatch.setattr(MemoryRule, "as_on_gpu", as_on_gpu)
    ids, starts = rows(case)

    def found(model):
        logits = model(ids, starts=starts, memory=model.init_memory(len(ids))).logits
        return logits, *torch.autograd.grad(logits.sin().sum(), list(model.parameters()))

    model, compiled = build(memory, sliding_window=sliding), build(memory, sliding_window=sliding)
    torch.compiler.reset()
    for layer in compiled.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(found(compiled), found(model), rtol=1e-10, atol=1e-10)
