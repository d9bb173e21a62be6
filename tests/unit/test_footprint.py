"""The memory that a rank is said to need, against real peaks and DeepSpeed's own estimators; `infini-train plan`."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from infini_train.commands import main
from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.model.flops import parameters
from infini_train.plan import wire_bytes
from infini_train.training import footprint
from infini_train.training.footprint import Setting, bytes_per_rank, states
from infini_train.training.optim import OptimizerOptions, build
from tests.helpers.peak import ROWS, SEGMENT, WINDOW, config_of


def setting(
    stage: int = 0, ranks: int = 1, recompute: bool = False, half: bool = False, chunk: int | None = None
) -> Setting:
    # Buckets and live weights of one element: nothing but the model's states.
    buckets = {"reduce_bucket_size": 1, "allgather_bucket_size": 1, "stage3_max_live_parameters": 1}
    zero = {"stage": stage, **buckets} if stage else {}
    how = {"half_precision": half, "activation_checkpointing": recompute, "gpu": False}
    return Setting(zero, ranks, ROWS, WINDOW, ROWS, **how, chunk=chunk)


@pytest.mark.parametrize(
    ("rule", "recompute", "chunk"),
    [
        ("selective-delta", 0, 0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                *((rule, recompute, 0) for rule in ("paper-linear", "paper-delta") for recompute in (0, 1)),
                ("selective-delta", 0, 2),
                ("selective-delta", 1, 0),
                ("selective-delta", 1, 4),
                ("paper-linear", 0, 1),
                ("paper-delta", 0, 8),
            ]
        ),
    ],
)
def test_peak_of_real_steps(rule, recompute, chunk):
    command = [sys.executable, "-m", "tests.helpers.peak", rule, str(recompute), str(chunk)]
    # Blocks go back to the system at once: what is resident is what is held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    measured = float(done.stdout)
    said = bytes_per_rank(config_of(rule), setting(recompute=bool(recompute), chunk=chunk * SEGMENT or None))
    assert sum(said.values()) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("rule", "hidden", "intermediate", "heads", "layers", "measured"),
    [
        ("paper-linear", 768, 2048, 12, 4, 7.3),
        ("selective-delta", 768, 2048, 12, 4, 9.3),
        ("selective-delta", 2048, 5632, 32, 2, 12.1),
    ],
)
def test_peaks_of_a_gpu(rule, hidden, intermediate, heads, layers, measured):
    """GiB that torch had allocated at the peak of forward and backward on an H200 (docs/performance.md)."""
    sizes = {"vocab_size": 32000, "hidden_size": hidden, "intermediate_size": intermediate, "segment_length": 2048}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": 4, "num_hidden_layers": layers}
    one_window = Setting({}, 1, 1, 32768, 1, half_precision=True, activation_checkpointing=False, gpu=True)
    said = bytes_per_rank(InfiniConfig(**sizes, memory=rule), one_window)
    assert (said["weights"] + said["activations"]) / 2**30 == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("rule", "chunk"), [("paper-linear", None), pytest.param("selective-delta", 512, marks=pytest.mark.slow)]
)
def test_three_chunks_of_an_output_memory_stand_for_all(rule, chunk, monkeypatch):
    """Also of nine rows, of which eight are handled at once."""
    sizes = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "segment_length": 256}
    config = InfiniConfig(**sizes, num_attention_heads=2, memory=rule, output_memory_dim=48)
    found = []
    for chunks in (footprint.CHUNKS, None):
        monkeypatch.setattr(footprint, "CHUNKS", chunks)
        words = config.to_json_string(use_diff=False), 2, 1024, chunk, 9, True, False, True
        found.append(footprint._peak.__wrapped__(*words))
    assert found[0] == found[1] > 0


@pytest.mark.parametrize("stage", [2, 3])
def test_states_are_those_of_deepspeeds_estimators(stage):
    config, ranks = config_of("selective-delta"), 8
    found = bytes_per_rank(config, setting(stage, ranks, half=True))
    states = found["weights"] + found["gradients"] + found["optimizer"]
    count, options = parameters(config), {"num_gpus_per_node": ranks, "num_nodes": 1, "cpu_offload": False}
    if stage == 2:
        _, expected = estimate_zero2_model_states_mem_needs(count, **options)
    else:
        _, expected, _ = estimate_zero3_model_states_mem_needs(count, 0, **options)
        expected += 2 * count / ranks  # the weights' or the gradients' half-precision share, which it leaves out
    assert states == pytest.approx(expected, rel=1e-6)


def test_what_zero_splits():
    config = config_of("paper-linear")
    for stage in (1, 2, 3):
        one, eight = (bytes_per_rank(config, setting(stage, ranks)) for ranks in (1, 8))
        split = [kind for kind in one if eight[kind] == one[kind] / 8]
        # Under ZeRO-1 every rank has whole gradients beside its part of their float32 copy.
        assert split == ["weights", "gradients", "optimizer"][3 - stage :]


def test_what_chunks_add():
    """The sums of the gradients of the chunks so far, where gradients are split or accumulated, and the weights of a
    recomputed chunk, where they are split and layers are not recomputed in turn."""
    config = config_of("paper-linear")
    count = parameters(config)
    for stage, recompute, lanes, expected in (
        (0, False, ROWS, {}),
        (0, False, 2 * ROWS, {"gradients": 4 * count}),
        (1, True, ROWS, {}),
        (2, False, ROWS, {"gradients": 2 * count}),
        (3, False, ROWS, {"gradients": 2 * count, "buffers": 2 * count}),
        (3, True, ROWS, {"gradients": 2 * count}),
    ):
        whole = replace(setting(stage, 8, recompute, half=stage > 0), lanes=lanes)
        without, added = states(config, whole), states(config, replace(whole, chunk=2 * SEGMENT))
        assert {kind: size - without[kind] for kind, size in added.items() if size != without[kind]} == expected


def test_what_muon_keeps():
    """As many values as are in the optimizer's state after a step, but for AdamW's count of steps."""
    config = config_of("selective-delta")
    model = InfiniForCausalLM(config)
    optimizer, _ = build(model, OptimizerOptions(name="muon"), max_steps=1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = sum(x.numel() for state in optimizer.state.values() for key, x in state.items() if key != "step")
    assert states(config, replace(setting(), muon=True))["optimizer"] == 4 * kept


def test_what_muon_sends():
    """By hand, for 8 layers of 2^20 elements in matrices, of which 4 ranks hold pieces: they go out and come back."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = InfiniConfig(vocab_size=64, num_hidden_layers=8, **sizes)
    sent = {
        stage: wire_bytes(config, replace(setting(stage, 4), muon=True), 1, 1).get("updates")
        for stage in (0, 1, 2, 3)
    }
    cut = 3 * 256 * 1024  # at most one matrix at each of three borders
    assert sent == {0: None, 1: 2 * 4 * cut * 3 / 4, 2: 2 * 4 * cut * 3 / 4, 3: 2 * 4 * 8 * 2**20 * 3 / 4}


def plan(capsys, *words: str) -> tuple[dict, str]:
    with patch.object(sys, "argv", ["infini-train", "plan", *words]):
        main()
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


def test_plan_of_a_shipped_configuration(capsys):
    """Its data is not here, nor 128 GPUs. The figures by hand."""
    found, out = plan(capsys, "--config", "configs/8b.yaml", "--nodes", "16", "--tokens", "1e12", "--mfu", "0.5")
    assert found["parameters"] == pytest.approx(8.04e9, rel=1e-3)
    assert found["tokens_per_step"] == 128 * 32768
    rate = 0.5 * 989e12 * 128 / found["flops_per_token"]
    assert found["tokens_per_s"] == pytest.approx(rate)
    assert found["days"] == pytest.approx(1e12 / rate / 86400)
    # bf16: gradients reduced once, weights gathered twice
    assert sum(found["wire_bytes"].values()) == pytest.approx(3 * 2 * found["parameters"] * 127 / 128)
    assert found["memory_gib"]["zero3 recomputing"]["weights"] == pytest.approx(2 * found["parameters"] / 128 / 2**30)
    assert out.count("(configured)") == 1
    assert "does not fit" not in out
    _, out = plan(capsys, "--config", "configs/8b.yaml", "--nodes", "16", "--gpu_memory_gib", "16")
    assert "zero3 recomputing does not fit" in out and "what does:" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "abacus"], "device: found abacus, expected one of h100"),
        (["--nodes", "0"], "nodes: found 0, expected at least 1"),
        (["--mfu", "1.5"], "mfu: found 1.5"),
        (["--gpu_memory_gib", "0"], "gpu_memory_gib: found 0.0, expected more than 0"),
        (["--tokens", ".nan"], "tokens: found nan, expected more than 0"),
        (["--nodes", "3"], "data.lanes: found 128, expected a multiple of micro_batch_size"),
    ],
)
def test_bad_options_are_named(capsys, words, message):
    with pytest.raises(SystemExit) as end:
        plan(capsys, "--config", "configs/8b.yaml", *words)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_sliding_window_and_an_output_memory_are_counted():
    """With fake tensors, which have no values to look at."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    setting = Setting({}, 1, 1, 64, 1, half_precision=False, activation_checkpointing=False, gpu=False)
    plain = bytes_per_rank(InfiniConfig(**sizes, segment_length=16), setting)
    more = bytes_per_rank(InfiniConfig(**sizes, segment_length=16, sliding_window=32, output_memory_dim=4), setting)
    assert more["activations"] > plain["activations"]
    near = 2 * 2 * 16 * 16 + 16  # keys and values of the last 16 tokens, 2 heads of 16, and whose they are
    assert more["lane memories"] - plain["lane memories"] == 4 * (32 * near + 64 * 4)  # 32 layers
