"""selective-delta cannot diverge: adversarial inputs, 10,000 segments in float32."""

import pytest
import torch

from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.model.memory_rule import density
from infini_train.model.selective_delta import SelectiveDelta
from infini_train.model.window import Window

SEGMENTS, S, D = 10_000, 8, 8
NO_ROPE = torch.empty(0), torch.empty(0)  # rules see queries and keys without RoPE


def rule() -> SelectiveDelta:
    sizes = {"vocab_size": 11, "hidden_size": D, "intermediate_size": 8, "num_hidden_layers": 1}
    return SelectiveDelta(InfiniConfig(**sizes, num_attention_heads=1, head_dim=D, memory="selective-delta"))


def inputs(case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Convolved keys and values, and logits of write strengths, of a row of one head."""
    torch.manual_seed(0)
    k = torch.randn(1, SEGMENTS, 1, S, D)
    v = torch.randn(1, SEGMENTS, 1, S, D)
    strength = torch.full((1, SEGMENTS, 1, S), 30.0)
    sign = torch.where(torch.arange(S) % 2 == 0, 1.0, -1.0)[:, None]
    if case == "one key":
        k = torch.ones_like(k)
    elif case == "nearly the same key, opposite values":
        k, v = 1 + 1e-2 * k, sign * torch.ones_like(v)
    elif case == "huge":
        k, v = 1e4 * k, 1e4 * v
    elif case == "key mass jumps":
        k = k * 10.0 ** torch.randint(-6, 6, (1, SEGMENTS, 1, 1, 1))
    elif case == "strength anything":
        strength = 20 * torch.randn_like(strength)
    return k, v, strength


@pytest.mark.parametrize(
    "case",
    ["random", "one key", "nearly the same key, opposite values", "huge", "key mass jumps", "strength anything"],
)
def test_cannot_diverge(case):
    memory, (k, v, strength) = rule(), inputs(case)
    w = memory.strength(strength)
    assert w.min() >= 0 and w.max() <= 1
    keep, _ = memory.segment_maps(k, v, w)
    assert torch.linalg.matrix_norm(keep, 2).max() <= 1 + 1e-5  # no write enlarges what the memory holds

    # For ever, not only after so many segments (docstring of SelectiveDelta).
    for_ever = v.square().sum(-1).max().item() * (S + 0.5 / memory.decay_rate().item())
    state, bound = {"M": torch.zeros(1, 1, D, D)}, 0.0
    for part in range(0, SEGMENTS, 100):
        some = slice(part, part + 100)
        with torch.no_grad():
            features = {"strength_logit": strength[:, some].transpose(2, 3).flatten(1, 2)}
            window = Window(k[:, some].shape[1], NO_ROPE, NO_ROPE)
            read, _, state, _ = memory.read_and_write(
                state, k[:, some].unsqueeze(3), k[:, some], v[:, some], features, window
            )
        bound += (w[:, some, ..., None] * v[:, some].square()).double().sum().item()
        assert state["M"].double().square().sum() <= min(bound, for_ever) * (1 + 1e-4)
        assert read.isfinite().all() and read.square().mean(-1).max() <= 1 + 1e-4


@pytest.mark.parametrize("strong", [0, 1, 4, 32])
@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_density(strong, strength):
    """n of T tokens written alike, the others not at all: n / T over sqrt(n / T), whatever the strength."""
    logit = torch.tensor((strength + 0.1) / 1.2).logit() if strength < 1 else torch.tensor(30.0)
    logits = torch.full((1, 4, 1, 8), -30.0)
    logits.view(-1)[torch.randperm(32)[:strong]] = logit
    assert density(SelectiveDelta.mean_strengths(logits)).item() == pytest.approx((strong / 32) ** 0.5, abs=1e-3)


@pytest.mark.parametrize("length", [3, S, 3 * S + 5])
def test_density_is_that_of_the_tokens(length):
    """Of a window that ends inside a segment, and of rows with padding anywhere: as of each row's tokens alone."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": D, "intermediate_size": 8, "num_hidden_layers": 1, "segment_length": S}
    model = InfiniForCausalLM(InfiniConfig(**sizes, num_attention_heads=1, memory="selective-delta")).double()
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.rule.strength_weight.normal_()

    def expected(ids: torch.Tensor) -> float:
        x = layer.input_layernorm(model.model.embed_tokens(ids))
        w = SelectiveDelta.strength(x @ layer.self_attn.rule.strength_weight[0] + layer.self_attn.rule.strength_bias)
        return (w.mean() / (w.square().mean() + 1e-6).sqrt()).item()

    ids = torch.randint(11, (2, length))
    alone = [expected(row) for row in ids]
    assert density(model.train().model(ids).strengths).item() == pytest.approx(sum(alone) / 2, rel=1e-9)
    mask = torch.ones(2, length + 4)
    mask[0, 1:5] = mask[1, :4] = 0
    padded = torch.full((2, length + 4), 7)
    padded[mask.bool()] = ids.flatten()
    assert density(model.model(padded, attention_mask=mask).strengths).item() == pytest.approx(
        sum(alone) / 2, rel=1e-9
    )
    mask[0] = 0  # a row without tokens writes nothing
    assert density(model.model(padded, attention_mask=mask).strengths).item() == pytest.approx(alone[1] / 2, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("forget", [-1e4, 88.0, 1e4])
@pytest.mark.parametrize("strength", [-1e4, 0.0, 1e4])
def test_extreme_parameters(dtype, forget, strength):
    """A strength of 0 leaves the memory as it is at any rate of forgetting, and no rate gives NaN, forward or
    backward."""
    torch.manual_seed(0)
    memory = rule().to(dtype)
    torch.nn.init.constant_(memory.forget, forget)
    least = torch.float64 if dtype == torch.float64 else torch.float32
    m = torch.randn(1, 1, D, D, dtype=least, requires_grad=True)
    k, v = torch.randn(2, 1, 3, 1, S, D, dtype=least)
    logits = torch.full((1, 3, 1, S), strength, dtype=least, requires_grad=True)
    expected = m if strength < 0 else None
    if strength >= 0 and forget > 0:  # all is forgotten: what the segments before the last have left does not matter
        w = memory.strength(logits[:, -1:])
        expected = memory.write_in_turn(torch.zeros_like(m), k[:, -1:], v[:, -1:], w, None)[1]
    for write in (memory.write_in_turn, memory.write_at_once):
        last = write(m, k, v, memory.strength(logits), None)[1]
        if expected is not None:
            torch.testing.assert_close(last, expected)
        gradients = torch.autograd.grad(last.sin().sum(), [m, logits, memory.forget])
        assert all(x.isfinite().all() for x in (last, *gradients))


@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_of_the_density_reaches_the_strengths(recompute):
    """Only in training; also through recomputed activations."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": D, "intermediate_size": 8, "num_hidden_layers": 2, "segment_length": S}
    model = InfiniForCausalLM(InfiniConfig(**sizes, num_attention_heads=1, memory="selective-delta"))
    if recompute:
        model.activation_checkpointing_enable()
    ids = torch.randint(11, (2, 4 * S))
    assert model.eval().model(ids).strengths is None
    with torch.no_grad():  # alike, as at first, they are as dense as can be, and in a maximum all slopes are 0
        for layer in model.model.layers:
            layer.self_attn.rule.strength_weight.normal_()
    density(model.train().model(ids).strengths).backward()
    for layer in model.model.layers:
        assert layer.self_attn.rule.strength_weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("size", [5, 64, 200, 300, 448])  # 1, 1, 4, 5 and 7 chunks
def test_in_turn_as_at_once(size):
    """The two orders of the same writes: memories, and gradients of all that they depend on."""
    torch.manual_seed(0)
    memory = rule().double()
    shapes = (2, 1, D, D), (2, 3, 1, size, D), (2, 3, 1, size, D), (2, 3, 1, size)
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    keep_bn = torch.tensor([[True, True, False], [False, True, True]])
    found = []
    for write in (memory.write_in_turn, memory.write_at_once):
        before, last = write(*given[:3], given[3].sigmoid(), keep_bn)
        loss = before.sin().sum() + last.sin().sum()
        found.append([before, last, *torch.autograd.grad(loss, [*given, memory.forget])])
    torch.testing.assert_close(*found)
