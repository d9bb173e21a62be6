"""Windows in chunks: the losses, gradients and memories of the whole window, and what a run makes of them."""

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from infini_train.model import InfiniForCausalLM
from infini_train.training.allocator import has_glibc_malloc
from infini_train.training.chunks import window_losses
from infini_train.training.module import InfiniModule
from tests.helpers.datasets import make_dataset
from tests.helpers.long_window import CHUNK, LONGEST, small_model
from tests.helpers.models import MODELS, STARTS, VOCAB, S, build, rows
from tests.helpers.results import LENGTHS, assert_identical, check_same, results
from tests.helpers.runs import fit


def outcome(model: InfiniForCausalLM, case: str, chunk: int | None) -> tuple[Tensor, Tensor, list, dict]:
    """Of two windows of 6 segments, over which the memories are carried: the sums of the losses, the losses, the
    memories at the end, and the gradients of losses and writing cost."""
    ids, starts = rows(case, 12 * S)
    memory, totals, losses = None, [], []
    for at in (0, 6 * S):
        part = slice(at, at + 6 * S)
        out = window_losses(
            model,
            ids[:, part],
            ids.roll(-1, 1)[:, part],
            starts=starts[:, part],
            memory=memory,
            segments_per_chunk=chunk,
        )
        totals.append(out.total + (0 if out.density is None else 100 * out.density))
        losses.append(out.losses)
        memory = [{name: x.detach() for name, x in layer.items()} for layer in out.memory]
    torch.stack(totals).sum().backward()
    return torch.stack(totals), torch.cat(losses, 1), memory, {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(("memory", "sliding"), MODELS)
@pytest.mark.parametrize("case", STARTS)
def test_chunks_equal_the_whole_window(memory, sliding, case):
    """Chunks of 1, 2 and 4 segments (4 and then 2), the last with recomputed layers inside."""
    expected = outcome(build(memory, sliding_window=sliding).train(), case, None)
    assert all(x.abs().max() > 0 for x in expected[3].values())
    for chunk in (1, 2, 4, 6):
        model = build(memory, sliding_window=sliding).train()
        if chunk == 4:
            model.activation_checkpointing_enable()
        torch.testing.assert_close(outcome(model, case, chunk), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["paper-delta", "selective-delta"])
def test_compiled_layers(memory):
    """As torch.compile traces them (without Inductor, which would take minutes)."""
    expected = outcome(build(memory).train(), "anywhere", 2)
    model = build(memory).train()
    torch.compiler.reset()
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(outcome(model, "anywhere", 2), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["paper-delta", "selective-delta"])
def test_the_gradient_of_65536_tokens_is_that_of_the_whole_window(rule):
    """256 segments in 8 chunks, nearly all of one document, in float64."""
    model, found = small_model(rule, torch.float64), []
    ids = torch.randint(256, (1, 65_536))
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[0, 5_000] = True
    for chunk in (None, CHUNK):
        model.zero_grad()
        out = window_losses(model, ids, ids.roll(-1, 1), starts=starts, segments_per_chunk=chunk)
        out.total.backward()
        found.append((out.total.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (whole, expected), (total, gradients) = found
    torch.testing.assert_close(total, whole, rtol=1e-10, atol=0)
    for name, gradient in gradients.items():
        assert expected[name].norm() > 0 and (gradient - expected[name]).norm() < 1e-8 * expected[name].norm(), name


@pytest.mark.slow
def test_the_memory_of_a_million_tokens_is_that_of_16384():
    """A single window of each length with its gradient, in chunks of 8,192 tokens."""
    peaks = []
    for tokens in (16_384, LONGEST):
        command = [sys.executable, "-m", "tests.helpers.long_window", str(tokens)]
        peaks.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert 0 < peaks[1] < 1.5 * peaks[0], peaks


def test_autocast_adds_up_the_gradients_of_chunks_in_float32():
    """The rounding errors of 32 chunks are those of the whole window; added up in bfloat16 they are half as large
    again."""
    torch.manual_seed(1)
    ids, found = torch.randint(VOCAB, (1, 32 * S)), {}
    for name, half, chunk in (("exact", False, None), ("whole", True, None), ("chunks", True, 1)):
        model = build("paper-linear", torch.float32).train()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.2)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            window_losses(model, ids, ids.roll(-1, 1), segments_per_chunk=chunk).total.backward()
        weights = [p.grad for layer in model.model.layers for p in layer.mlp.parameters()]
        found[name] = torch.cat([g.flatten() for g in weights])
    errors = {name: (found[name] - found["exact"]).norm() for name in ("whole", "chunks")}
    assert 0 < errors["chunks"] < 1.15 * errors["whole"]


CHUNKS = ("--model.segments_per_chunk", "1", "--model.memory", "selective-delta", "--model.write_cost", "0.5")
ADVICE = "windows in chunks are faster with jemalloc"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chunks") / "shards"
    make_dataset(root, LENGTHS)
    return root


@pytest.fixture(scope="module")
def chunked(dataset: Path) -> tuple[Path, int]:
    """A run whose windows of 4 segments are cut into chunks of one, and the number of its instants."""
    run = fit(dataset.parent / "chunked", dataset, *CHUNKS)
    assert run.code == 0, run.err
    assert (ADVICE in run.err) == has_glibc_malloc()
    return dataset.parent / "chunked", run.instants


def test_a_run_is_that_of_whole_windows(dataset, chunked, tmp_path):
    """Curves, weights, optimizer, memories; losses, memories and their use in validation, which runs in chunks, too;
    documents that start anywhere, lanes that drop their memory, and a cost of writing."""
    run = fit(tmp_path / "whole", dataset, *CHUNKS[2:])
    assert run.code == 0, run.err
    assert ADVICE not in run.err
    found, expected = results(chunked[0]), results(tmp_path / "whole")
    check_same(found, expected)
    for name in ("val/loss", "val/memory_share"):
        (a, b) = (torch.tensor(r["curves"][name]) for r in (found, expected))
        assert len(a) > 1
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_killed_and_resumed_to_the_bit(dataset, chunked, tmp_path):
    run = tmp_path / "killed"
    assert fit(run, dataset, *CHUNKS, die_at=chunked[1] * 2 // 5).code == -signal.SIGKILL
    assert fit(run, dataset, *CHUNKS).code == 0
    found, expected = results(run), results(chunked[0])
    for state in (expected["state"], found["state"]):
        state.pop("loops", None)  # Lightning counts its own restarts
    assert_identical(found, expected)


def test_bad_options():
    with pytest.raises(ValueError, match=r"model\.segments_per_chunk: found 0, expected at least 1, or none"):
        InfiniModule(segments_per_chunk=0)


def test_ranks_that_share_windows_are_refused():
    module = InfiniModule(segments_per_chunk=2)
    data = SimpleNamespace(context_parallel=2, tokenizer_file="tokenizer.json", check_model=lambda *_: None)
    module._trainer = SimpleNamespace(datamodule=data, strategy=None)
    with pytest.raises(
        ValueError, match=r"segments_per_chunk: found 2, expected none with data\.context_parallel = 2"
    ):
        module.setup("fit")
