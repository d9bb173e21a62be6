"""The baselines on books are what they claim to be, and arms are compared document by document."""

import math
import statistics

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from benchmarks import baselines
from benchmarks.baselines import BaselineCLI, convert
from benchmarks.books import compare
from infini_train.cli import train
from infini_train.model import InfiniConfig, InfiniForCausalLM
from tests.helpers.datasets import make_dataset
from tests.helpers.models import run_windows
from tests.helpers.reference import row_logits

S, VOCABULARY = 5, 23
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROWS = [[7, 40, 3, 1, 2, 7], [31, 4, 5, 5, 15], [60]]  # lengths of the documents that follow one another in each row


def pair(baseline: str) -> tuple[InfiniForCausalLM, LlamaForCausalLM]:
    """A baseline and transformers' Llama with its weights, float64."""
    torch.manual_seed(0)
    config = InfiniConfig(**SIZES, segment_length=S, initializer_range=0.4)
    model = InfiniForCausalLM(config)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager"))
    wrong = llama.load_state_dict(model.state_dict(), strict=False)
    assert not wrong.missing_keys and all(name.endswith("self_attn.gate") for name in wrong.unexpected_keys)
    return convert(model, baseline).double(), llama.double()


def dense(llama: LlamaForCausalLM, ids_T: torch.Tensor, offset: int, reach: int) -> torch.Tensor:
    """Logits of one document, whole, that begins at `offset` of its row, under an explicit mask: `reach` segments
    back and not later."""
    t = torch.arange(len(ids_T))
    segment = (offset + t) // S
    seen = (t[:, None] >= t) & (segment[:, None] - segment <= reach)
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -math.inf)
    return llama(ids_T[None], attention_mask=mask[None, None], use_cache=False).logits[0]


@pytest.mark.parametrize(("baseline", "reach"), [("local", 0), ("transformer-xl", 1)])
@pytest.mark.parametrize("segments", [1, 2, 12])
@torch.no_grad()
def test_packed_windows_equal_a_dense_mask_over_each_document(baseline, reach, segments):
    model, llama = pair(baseline)
    torch.manual_seed(1)
    ids = torch.randint(VOCABULARY, (len(ROWS), 60))
    starts, expected = torch.zeros(ids.shape, dtype=torch.bool), []
    for row, lengths in enumerate(ROWS):
        ends = torch.tensor(lengths).cumsum(0)
        assert ends[-1] == 60
        begins = (ends - torch.tensor(lengths)).tolist()
        starts[row, begins] = True
        parts = ids[row].split(lengths)
        expected.append(torch.cat([dense(llama, x, at, reach) for x, at in zip(parts, begins, strict=True)]))
    found = run_windows(model, ids, starts, segments * S)
    # RoPE's angles are float32, and Llama's positions run on.
    torch.testing.assert_close(found, torch.stack(expected), atol=2e-4, rtol=0)
    assert torch.stack(expected).std() > 0.5


@pytest.mark.parametrize(("baseline", "sliding"), [("local-convolved", None), ("transformer-xl-convolved", 2 * S)])
@pytest.mark.parametrize("segments", [1, 2, 12])
@torch.no_grad()
def test_convolved_local_attention_is_the_rule_that_never_reads(baseline, sliding, segments):
    """The token-by-token reference, its gates shut."""
    torch.manual_seed(0)
    config = InfiniConfig(**SIZES, segment_length=S, initializer_range=0.4, memory="selective-delta", gate_init=-1e4)
    model = convert(InfiniForCausalLM(config).double(), baseline)
    assert model.config.sliding_window == sliding
    assert {
        name.split(".")[-1] for name, p in model.model.layers[0].self_attn.rule.named_parameters() if p.requires_grad
    } == {"conv"}
    ids, starts = torch.randint(VOCABULARY, (1, 60)), torch.zeros(1, 60, dtype=torch.bool)
    starts[0, [0, 7, 47, 50, 51, 53]] = True
    found = run_windows(model, ids, starts, segments * S)
    torch.testing.assert_close(found[0], row_logits(model, ids[0], starts[0]), atol=1e-9, rtol=0)


@pytest.mark.parametrize("segments", [1, 2, 12])
@torch.no_grad()
def test_packed_gated_deltanet_equals_the_recurrence_over_each_document(monkeypatch, segments):
    """transformers' recurrence, token by token, instead of its chunks; every document alone, in one window."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": SIZES["num_attention_heads"]}
    model = convert(
        InfiniForCausalLM(InfiniConfig(**sizes, segment_length=S, memory="selective-delta")), "gated-deltanet"
    )
    deltas = [layer.self_attn.delta for layer in model.model.layers if hasattr(layer.self_attn, "delta")]
    assert len(deltas) == 2
    for delta in deltas:
        torch.nn.init.normal_(delta.decay_and_strength.weight)
    ids, starts, alone = torch.randint(VOCABULARY, (1, 60)), torch.zeros(1, 60, dtype=torch.bool), []
    starts[0, [0, 7, 47, 50, 51, 53]] = True
    found = run_windows(model, ids, starts, segments * S)
    monkeypatch.setattr(baselines, "torch_chunk_gated_delta_rule", torch_recurrent_gated_delta_rule)
    for document in ids[0].tensor_split(starts[0].nonzero()[1:, 0]):
        padded = torch.nn.functional.pad(document, (0, -len(document) % S))  # what follows changes nothing before it
        alone.append(model.lm_head(model.model(padded[None]).last_hidden_state[:, : len(document)]))
    torch.testing.assert_close(found, torch.cat(alone, 1), atol=2e-4, rtol=0)
    assert torch.cat(alone, 1).std() > 0.1


def test_reach_is_one_segment_a_layer_and_causal():
    model, _ = pair("transformer-xl")
    inputs = model.model.embed_tokens(torch.randint(VOCABULARY, (1, 6 * S))).detach().requires_grad_()
    for t, nearest in ((6 * S - 1, 2 * S), (2 * S, 0)):
        out = model.model(inputs_embeds=inputs).last_hidden_state[0, t]
        (gradient,) = torch.autograd.grad(out.square().sum(), inputs)
        reached = gradient[0].abs().sum(-1) > 0
        assert reached[nearest : t + 1].all() and not reached[:nearest].any() and not reached[t + 1 :].any()


def fit(run, data, steps: int, *more: str) -> dict[str, torch.Tensor]:
    """Train, and the weights and the optimizer's state after the last step."""
    options = [f"--model.{name}={value}" for name, value in SIZES.items()]
    options += [f"--data.train={data}", f"--data.segment_length={S}", "--data.segments_per_window=2"]
    options += ["--data.lanes=2", "--data.micro_batch_size=2", "--data.num_workers=0", "--checkpoint.every_n_steps=3"]
    options += ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false"]
    options += [f"--trainer.max_steps={steps}", "--model.optimizer.schedule=wsd", "--model.optimizer.decay_steps=1"]
    train(BaselineCLI, ["fit", f"--run={run}", "--model.baseline=transformer-xl", *options, *more])
    return load_file(run / "checkpoints" / f"step-{steps:08d}" / "state-00000-of-00001.safetensors")


def test_resume_goes_on_with_the_segment_before(tmp_path):
    make_dataset(tmp_path / "data", [300, 70, 45], vocab_size=VOCABULARY)
    straight = fit(tmp_path / "straight", tmp_path / "data", 5)
    fit(tmp_path / "cut", tmp_path / "data", 3)
    resumed = fit(tmp_path / "cut", tmp_path / "data", 5, "--ckpt_path=last")
    assert straight.keys() == resumed.keys()
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name


def test_arms_are_compared_by_document_over_the_mean_of_seeds():
    """Documents of equal lengths: then the standard error is the usual one of paired differences."""
    rng = np.random.default_rng(0)
    on = {arm: rng.normal(size=(2, 3, 4)) for arm in ("ours", "theirs")}  # seeds, buckets, documents
    tokens = np.array([[5] * 4, [5] * 4, [8] * 4])

    def seed(array: np.ndarray) -> dict:
        zero = np.zeros_like(array).tolist()
        other = {name: zero for name in ("off", "other", "compared_on", "compared")}
        return {"parameters": 7, "losses": {"on": array.tolist(), "tokens": tokens.tolist(), **other}}

    found = {arm: [seed(array) for array in arrays] for arm, arrays in on.items()}
    figures = compare(found)
    seeds = {"ours": 2, "theirs": 2}
    assert (figures["seeds"], figures["documents"], list(figures["difference"])) == (seeds, 4, ["ours - theirs"])
    for name, rows in {"0": [0], "1": [1], "2-3": [2], "all": [0, 1, 2]}.items():
        by_document = [
            sum(on["ours"][s, b, d] - on["theirs"][s, b, d] for s in (0, 1) for b in rows)
            / (2 * sum(tokens[b, d] for b in rows))
            for d in range(4)
        ]
        expected = statistics.mean(by_document), statistics.stdev(by_document) / 2
        assert figures["difference"]["ours - theirs"][name] == pytest.approx(expected)
    # An arm of one seed is compared with the same seed of the other.
    lone = compare({"ours": found["ours"], "theirs": found["theirs"][:1]})["difference"]["ours - theirs"]["all"][0]
    assert lone == pytest.approx((on["ours"][0] - on["theirs"][0]).sum() / tokens.sum())
    assert lone == pytest.approx(figures["by_seed"]["ours - theirs"][0])
    found["theirs"][0]["losses"]["tokens"][0][0] = found["theirs"][1]["losses"]["tokens"][0][0] = 4
    with pytest.raises(ValueError, match="theirs: found other tokens than of ours"):
        compare(found)
