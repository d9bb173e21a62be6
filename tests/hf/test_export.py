"""Exports in an environment without infini-train give the trained model's logits; they come whole or not at all."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard, load_torch_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import data_prep.__main__ as data_prep
import infini_train.hf  # noqa: F401 (the Auto classes)
from infini_train.hf.card import Publication, Training, model_card
from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.tokenizer.loading import load_tokenizer
from infini_train.training.module import InfiniModule
from tests.helpers.commands import command
from tests.helpers.hub import hub
from tests.helpers.results import tensors
from tests.helpers.runs import fit

REPOSITORY = Path(__file__).parents[2]
S, VOCABULARY = 8, 400
SIZES = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "num_key_value_heads",
]
TEXT = "def f(x):\n    return '<s> déjà vu' if x else None\n" * 3
# Validated at steps 2 and 4 (in micro-batches: 4 and 8).
INTERVALS = ["--trainer.val_check_interval", "4", "--checkpoint.every_n_steps", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SimpleNamespace:
    """A run of four steps on real text, and the Lightning module with its weights."""
    root = tmp_path_factory.mktemp("export")
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:20]
    for source in sources:
        (root / "documents").mkdir(exist_ok=True)
        (root / "documents" / source.with_suffix(".txt").name).write_text(source.read_text()[:4000])
    documents, tokenizer, shards = (str(root / name) for name in ("documents", "tokenizer.model", "shards"))
    assert data_prep.main(["tokenizer", documents, "--out", tokenizer, "--vocab-size", str(VOCABULARY)]) == 0
    words = ["--tokenizer", tokenizer, "--out", shards, "--validation-fraction", "0.2", "--workers", "1"]
    assert data_prep.main(["shard", documents, *words]) == 0
    data = root / "shards" / "train", "--data.validation", str(root / "shards" / "valid")
    options = ["--model.vocab_size", str(VOCABULARY), "--model.initializer_range", "0.3", *INTERVALS]
    run = fit(root / "run", *data, *options, "--trainer.max_steps", "4")
    assert run.code == 0, run.err
    last = root / "run" / "checkpoints" / "step-00000004"
    sizes = {name: json.loads((last / "model_config.json").read_text())[name] for name in SIZES}
    module = InfiniModule(**sizes, segment_length=S)
    module.configure_model()
    saved = tensors(last)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(saved[f"weight/{name}"].view_as(p))
    out = root / "out"
    assert command("export", root / "run" / "checkpoints", out) == 0
    return SimpleNamespace(root=root, data=data, options=options, last=last, module=module.eval(), out=out)


def logits(module: InfiniModule, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return module.model(ids).logits


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """The interpreter of a fresh environment with what an export's user has, and not infini-train."""
    root = tmp_path_factory.mktemp("venv")
    venv.create(root, with_pip=True)
    packages = ["torch", "transformers", "safetensors", "sentencepiece"]
    pip = [root / "bin" / "python", "-m", "pip", "install", "-q", "-c", REPOSITORY / "constraints.txt"]
    subprocess.run([*pip, *packages], check=True)
    return root / "bin" / "python"


@pytest.mark.timeout(600)
def test_logits_and_ids_in_another_environment(trained, elsewhere, tmp_path):
    tokens = load_tokenizer(trained.root / "tokenizer.model").encode(TEXT)[:-1].astype("int64")  # without EOS
    ids = torch.from_numpy(tokens)[None]
    assert ids.shape[1] > 8 * S
    torch.save((ids, logits(trained.module, ids), TEXT), tmp_path / "expected.pt")
    script = """
import importlib.util, sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
assert importlib.util.find_spec("infini_train") is None
out, expected = sys.argv[1:]
ids, logits, text = torch.load(expected, weights_only=True)
model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
with torch.no_grad():
    torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-5)
    hidden = AutoModel.from_pretrained(out, trust_remote_code=True)(ids).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), logits, rtol=0, atol=1e-5)
    for kind in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        head = kind.from_pretrained(out, trust_remote_code=True, num_labels=2).eval()
        scores = head.score(hidden)
        expected = scores[:, -1] if kind is AutoModelForSequenceClassification else scores
        torch.testing.assert_close(head(ids).logits, expected, rtol=0, atol=1e-5)
    config = AutoConfig.from_pretrained(out, trust_remote_code=True)
    assert config.max_position_embeddings == 1_048_576, config
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    assert made[0, ids.shape[1]] == logits[0, -1].argmax()
tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
assert tokenizer(text, return_tensors="pt", split_special_tokens=True).input_ids.equal(ids)
assert tokenizer(text).input_ids.count(tokenizer.bos_token_id) == 1 + text.count("<s>")
assert tokenizer.decode(ids[0, 1:]) == text
"""
    keep = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**keep, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    words = [elsewhere, "-c", script, trained.out, tmp_path / "expected.pt"]
    subprocess.run(words, check=True, cwd=tmp_path, env=environment)


def test_import_and_fit_at_rate_0_and_export_change_nothing(trained, tmp_path):
    again, run, out = (tmp_path / name for name in ("again", "run", "out"))
    assert command("import", trained.out, again) == 0
    unset = [word for name in SIZES for word in (f"--model.{name}", "null")]
    still = ["--model.optimizer.lr", "0", "--model.optimizer.gate_lr", "0", "--trainer.max_steps", "1"]
    result = fit(run, *trained.data, *unset, *still, "--model.pretrained", str(again))
    assert result.code == 0, result.err
    assert command("export", run / "checkpoints", out) == 0
    for directory in (again, out):
        found, expected = load_file(directory / "model.safetensors"), load_file(trained.out / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert {p.name for p in directory.iterdir()} | {"README.md"} == {p.name for p in trained.out.iterdir()}
        for file in trained.out.iterdir():
            if file.name not in ("README.md", "model.safetensors"):
                assert (directory / file.name).read_bytes() == file.read_bytes(), file.name
    assert "| started from | `again` |" in (out / "README.md").read_text()


def test_shards(trained, tmp_path):
    assert command("export", trained.last, tmp_path / "out", "--max_shard_size", "100KB") == 0
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    assert all(file.stat().st_size < 110_000 for file in shards)
    ids = torch.arange(3, 40)[None]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(model(ids).logits, logits(trained.module, ids), rtol=0, atol=1e-6)
    assert command("import", tmp_path / "out", tmp_path / "one") == 0
    assert not list((tmp_path / "one").glob("*.index.json"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "one")


def test_card_and_configurations_tell_the_run(trained):
    card = ModelCard.load(trained.out / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.license is None
    index = json.loads((trained.root / "shards/train/index.json").read_text())
    metrics = json.loads((trained.last / "metrics.json").read_text())
    validation = metrics["validation"]
    total = sum(parameter.numel() for parameter in trained.module.parameters())
    for said in (
        f"dataset `shards/train`, {index['documents']:,} documents, {index['tokens']:,} tokens",
        f"fingerprint `{index['fingerprint'][:16]}`",
        f"| parameters | {total:,} |",
        f"| trained | 4 steps, {metrics['tokens']:,} tokens |",
        f"{metrics['loss']:.4f} nats",
        f"{validation['val/loss']:.4f} nats per token at step 4",
        f"{validation['val/memory_benefit']:.4f} nats",
        "| local attention | the token's own segment |",
        "| memory rule | paper-linear |",
        "Padding has a token other than EOS",
    ):
        assert said in card.content
    config = InfiniConfig.from_pretrained(trained.out)
    assert (config.max_position_embeddings, config.segment_length) == (1_048_576, S)
    generation = json.loads((trained.out / "generation_config.json").read_text())
    generation.pop("transformers_version")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert generation == {**ids, "do_sample": False}
    for file in trained.out.iterdir():
        assert file.stat().st_mode & 0o777 == 0o644, file


@pytest.mark.parametrize(
    ("window", "said"),
    [
        (2 * S, "| local attention | the token's own segment and the one before |"),
        (S + 2, f"| local attention | {S + 2} tokens, at most to the start of the segment before |"),
    ],
)
def test_a_card_tells_of_a_sliding_window_and_an_output_memory(window, said):
    metrics = {"step": 1, "tokens": 2, "loss": 3.0, "validation": None}
    training = Training(data="d", fingerprint=None, documents=None, tokens=None, metrics=metrics, pretrained=None)
    config = InfiniConfig(segment_length=S, sliding_window=window, output_memory_dim=5)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    card = model_card("name", config, training, special, Publication())
    assert said in card
    assert "| output memory | 5 features; " in card and "`infini_train.hf.trl_logits.use_model_logits()`" in card


TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }}{{ eos_token }}{% endfor %}"


def test_what_the_publisher_says(trained, tmp_path):
    """dtype, chat template and metadata are where huggingface_hub and transformers look for them."""
    (tmp_path / "template").write_text(TEMPLATE)
    said = ["--license", "apache-2.0", "--language", "en,de", "--datasets", "a/b,c", "--base_model", "d/e"]
    out, options = tmp_path / "out", ["--dtype", "bfloat16", "--chat_template", tmp_path / "template"]
    assert command("export", trained.last, out, *said, *options) == 0
    about = ModelCard.load(out / "README.md").data
    assert (about.license, about.language, about.datasets, about.base_model) == (
        *("apache-2.0", ["en", "de"], ["a/b", "c"]),
        "d/e",
    )
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    rendered = AutoTokenizer.from_pretrained(out).apply_chat_template(chat, tokenize=False)
    assert rendered == "<s><user> x</s><assistant> y</s>"
    config = InfiniConfig.from_pretrained(out)
    assert config.dtype == torch.bfloat16
    model = InfiniForCausalLM(config).to(torch.bfloat16)
    load_torch_model(model, out, strict=True)  # finds weights as the hub lays them out
    for name, value in trained.module.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.to(torch.bfloat16)), name
    # Nothing that the hub does not store: directories, links, hidden files.
    assert all(file.is_file() and re.fullmatch(r"\w[\w.-]*", file.name) for file in out.iterdir())


NAMED = """
import sys, torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer
name, expected = sys.argv[1:]
ids, logits, text = torch.load(expected)
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.someone."), type(model).__module__
torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-5)
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
assert tokenizer(text, split_special_tokens=True).input_ids == ids[0].tolist()
assert ModelCard.load(name).data.library_name == "transformers"
"""


def test_an_export_is_uploaded_as_it_is_and_loaded_by_name(trained, tmp_path):
    """By `hf upload` to a hub on this machine, which gets every file and nothing else, and from there."""
    tokens = load_tokenizer(trained.root / "tokenizer.model").encode(TEXT)[:-1].astype("int64")
    ids = torch.from_numpy(tokens)[None]
    torch.save((ids, logits(trained.module, ids), TEXT), tmp_path / "expected.pt")
    stored = tmp_path / "stored"
    stored.mkdir()
    with hub(stored, "someone/model") as server:
        online = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_none"}
        environment = {**os.environ, **online, "HF_HOME": str(tmp_path / "home")}
        for words in (
            [Path(sys.executable).with_name("hf"), "upload", server.repository, trained.out],
            [sys.executable, "-c", NAMED, server.repository, tmp_path / "expected.pt"],
        ):
            done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
    sent, exported = ({f.name: f.read_bytes() for f in d.iterdir()} for d in (stored, trained.out))
    assert sent == exported
    assert set(server.cards) == {(trained.out / "README.md").read_text()}  # what the hub would check


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ raise_exception('no users') }}"])
def test_a_broken_chat_template_is_named(trained, tmp_path, capsys, template):
    (tmp_path / "template").write_text(template)
    assert command("export", trained.last, tmp_path / "out", "--chat_template", tmp_path / "template") == 2
    assert f"{tmp_path / 'template'}: not a chat template" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["template"]


def test_the_last_validation_survives_a_resume(trained, tmp_path):
    """Validated at step 2, where the run ends, and resumed to 3."""
    for steps in ("2", "3"):
        run = fit(tmp_path / "run", *trained.data, *trained.options, "--trainer.max_steps", steps)
        assert run.code == 0, run.err
    files = [tmp_path / "run/checkpoints" / f"step-0000000{step}" / "metrics.json" for step in (2, 3)]
    first, second = (json.loads(file.read_text()) for file in files)
    assert first["validation"] == second["validation"] and second["validation"]["step"] == 2
    assert (first["step"], second["step"]) == (2, 3)


def lose_marker(checkpoint: Path) -> None:
    (checkpoint / "COMPLETE").unlink()


def other_config(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "model_config.json").read_text()) | {"intermediate_size": 49}
    (checkpoint / "model_config.json").write_text(json.dumps(config))
    sizes = {f.name: f.stat().st_size for f in checkpoint.iterdir() if f.name != "COMPLETE"}
    (checkpoint / "COMPLETE").write_text(json.dumps(sizes))


@pytest.mark.parametrize(
    ("change", "message", "extra"),
    [
        (lose_marker, "expected a complete checkpoint directory (no file COMPLETE in it)", []),
        (other_config, "layers.0.mlp.gate_proj.weight: found (48, 32), expected (49, 32)", []),
        (lambda c: (c / "cursor.json").write_text("x"), "cursor.json: found 1 bytes, expected", []),
        (lambda c: None, "nowhere: found no directory, expected a dataset", ["--dataset", "nowhere"]),
        (lambda c: None, "No such file or directory: 'nowhere'", ["--chat_template", "nowhere"]),
        (lambda c: None, "datasets: found 'my books', expected OWNER/NAME as on", ["--datasets", "a/b,my books"]),
        (lambda c: None, "base_model: found '/models/x', expected OWNER/NAME as on", ["--base_model", "/models/x"]),
        (lambda c: (c.parent / "out").mkdir(), "out: exists; name a directory that does not", []),
    ],
)
def test_bad_input_is_named(trained, tmp_path, capsys, change, message, extra):
    shutil.copytree(trained.last, tmp_path / trained.last.name)
    change(tmp_path / trained.last.name)
    before = set(tmp_path.iterdir())
    assert command("export", tmp_path / trained.last.name, tmp_path / "out", *extra) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert set(tmp_path.iterdir()) == before


def test_a_failure_halfway_leaves_nothing(trained, tmp_path, monkeypatch, capsys):
    """The tokenizer is written after the weights."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("infini_train.hf.commands.export_tokenizer", full)
    assert command("export", trained.last, tmp_path / "out") == 2
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
