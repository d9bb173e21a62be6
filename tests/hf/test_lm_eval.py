"""lm-evaluation-harness on a real export: its perplexity is that of `infini-train validate` and of a plain loop;
recall gives the same answers at any batch size; a model that knows the answers scores 1, one that does not 0."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import lm_eval
import pytest
import torch
import torch.nn.functional as F
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import data_prep.__main__ as data_prep
import infini_train.hf  # noqa: F401 (the Auto classes)
from data_prep.lm_eval_prompts import number, sentence
from infini_train import cli
from infini_train.data.index import DatasetIndex
from infini_train.data.reader import TokenReader
from infini_train.evaluation.__main__ import main
from infini_train.hf.commands import export
from tests.helpers.reference import document_logits
from tests.helpers.runs import arguments, fit

S, VOCABULARY = 8, 500
DEPTHS = ["0", "0.5", "1"]
RECALL = ["infini_passkey_320", "infini_passkey_480", "infini_kv_320", "infini_kv_480"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """Documents, their dataset, a model trained on it for some steps, its export and the tasks for it."""
    root = tmp_path_factory.mktemp("lm_eval")
    draw = random.Random(0)
    (root / "documents").mkdir()
    for i, sentences in enumerate([25, 1, 10]):
        text = "\n".join(f"{number(draw)} {sentence(draw)} <s> naïve" for _ in range(sentences))
        (root / "documents" / f"{i}.txt").write_text(text + "\n" * i)
    documents, tokenizer, shards = (str(root / name) for name in ("documents", "tokenizer.model", "shards"))
    assert data_prep.main(["tokenizer", documents, "--out", tokenizer, "--vocab-size", str(VOCABULARY)]) == 0
    assert data_prep.main(["shard", documents, "--tokenizer", tokenizer, "--out", shards, "--workers", "1"]) == 0
    # Far from uniform from the start, so that losses and answers differ from token to token.
    model = ["--model.vocab_size", str(VOCABULARY), "--model.initializer_range", "0.3"]
    result = fit(root / "run", Path(shards), *model, "--trainer.max_steps", "3")
    assert result.code == 0, result.err
    export(root / "run" / "checkpoints", root / "export")
    extra = ["--documents", documents, "--lengths", "320", "480", "--samples", "2", "--depths", *DEPTHS]
    assert main(["tasks", str(root / "tasks"), "--tokenizer", str(root / "export"), *extra]) == 0
    index = DatasetIndex.load(shards)
    reader = TokenReader(index)
    tokens = [torch.from_numpy(reader.read(d, 0, int(n)).astype("int64")) for d, n in enumerate(index.tokens_D)]
    assert max(map(len, tokens)) > 60 * S
    return SimpleNamespace(root=root, export=str(root / "export"), shards=shards, model=model, documents=tokens)


def harness(made, tasks: list[str], model="hf", extra={}, **options):  # noqa: B006
    """lm_eval in this process."""
    if model == "hf":
        options["model_args"] = {"pretrained": made.export, "trust_remote_code": True, "dtype": "float32"} | extra
    manager = TaskManager(include_path=str(made.root / "tasks"), include_defaults=False)
    return lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager, device="cpu", **options)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_perplexity_is_that_of_validate_and_of_a_plain_loop(made, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    as_text = AutoTokenizer.from_pretrained(made.export, split_special_tokens=True)  # documents spell <s>
    as_text.save_pretrained(tmp_path / "tokenizer")
    model = f"pretrained={made.export},trust_remote_code=True,dtype=float32,add_bos_token=False"
    model += f",tokenizer={tmp_path / 'tokenizer'}"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", model, "--device", "cpu"]
    command += ["--include_path", "../tasks", "--tasks", "infini_documents", "--batch_size", "2"]
    elsewhere = made.root / "elsewhere"  # the task files are found from any directory
    elsewhere.mkdir()
    run = [*command, "--output_path", str(tmp_path / "out"), "--log_samples"]
    subprocess.run(run, check=True, cwd=elsewhere, env=environment, capture_output=True, timeout=200)
    found = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]["infini_documents"]
    samples = next((tmp_path / "out").rglob("samples_infini_documents_*.jsonl")).read_text().splitlines()

    # The last label of a document is EOS; lm_eval scores all before it, `validate` that one too.
    exported = AutoModelForCausalLM.from_pretrained(made.export).double().eval()
    losses = []
    with torch.no_grad():
        for ids in made.documents:
            losses.append(F.cross_entropy(document_logits(exported, ids)[:-1], ids[1:], reduction="none"))
    without_eos = [loss[:-1] for loss in losses]
    tokens = sum(map(len, without_eos))
    total = sum(loss.sum().item() for loss in without_eos)
    assert found["nats_per_token,none"] == pytest.approx(total / tokens, rel=1e-5)
    by_document = sorted(-float(json.loads(line)["filtered_resps"][0]) for line in samples)
    assert by_document == pytest.approx(sorted(loss.sum().item() for loss in without_eos), rel=1e-5)
    size = sum(len(file.read_bytes()) for file in (made.root / "documents").iterdir())
    assert found["bits_per_byte,none"] == pytest.approx(total / size / torch.tensor(2.0).log().item(), rel=1e-5)

    words = [*arguments(made.root / "run", Path(made.shards))[1:], *made.model]
    names = {"--ckpt_path", "--trainer.max_steps"}
    kept = [w for pair in zip(words[::2], words[1::2], strict=True) if pair[0] not in names for w in pair]
    validated = cli.train(args=["validate", *kept, "--data.validation", made.shards])
    loss = validated.trainer.callback_metrics["val/loss"].item()
    with_eos = loss * sum(map(len, losses)) - sum(loss[-1].item() for loss in losses)
    assert found["nats_per_token,none"] == pytest.approx(with_eos / tokens, rel=1e-5)


def test_answers_do_not_depend_on_the_batch_and_are_those_of_a_plain_loop(made):
    one, two = (harness(made, RECALL, batch_size=n, log_samples=True)["samples"] for n in (1, 2))
    answers = {(t, s["doc_id"]): s["resps"][0][0] for t in RECALL for s in one[t]}
    assert answers == {(t, s["doc_id"]): s["resps"][0][0] for t in RECALL for s in two[t]}
    assert len(answers) == 4 * 2 * len(DEPTHS)
    assert len(set(answers.values())) > len(answers) / 2, "a model that always says the same tells nothing"
    lengths = sorted(s["doc"]["tokens"] for t in RECALL for s in two[t])  # lm_eval's batches are of like length
    assert sum(a != b for a, b in zip(lengths[::2], lengths[1::2], strict=True)) > 2, "else nothing is padded"
    tokenizer = AutoTokenizer.from_pretrained(made.export)
    model = AutoModelForCausalLM.from_pretrained(made.export).eval()
    for task in ("infini_passkey_480", "infini_kv_320"):
        for sample in two[task]:
            ids = tokenizer.encode(sample["doc"]["prompt"], add_special_tokens=False)  # the prompt spells BOS
            assert ids[0] == tokenizer.bos_token_id and len(ids) == sample["doc"]["tokens"]
            assert tokenizer.bos_token_id not in ids[1:]
            new: list[int] = []
            while len(new) < 16 and not {"\n", "."} & set(tokenizer.decode(new)):
                new.append(int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
                if new[-1] == tokenizer.eos_token_id:
                    break
            text = re.split(r"[\n.]", tokenizer.decode(new, skip_special_tokens=True))[0]
            assert answers[task, sample["doc_id"]] == text


def test_automatic_batches_are_tried_at_the_length_given(made, monkeypatch):
    """lm_eval tries batches of `max_length`, which is max_position_embeddings unless it is given."""
    tried, call = [], HFLM._model_call

    def noted(self, ids, **options):
        tried.append(tuple(ids.shape))
        return call(self, ids, **options)

    monkeypatch.setattr(HFLM, "_model_call", noted)
    task = ["infini_kv_320"]
    found = harness(made, task, extra={"max_length": 320 + 16}, batch_size="auto", log_samples=True)
    assert tried == [(64, 320 + 16)] * 5
    plain = harness(made, task, batch_size=2, log_samples=True)
    for a, b in zip(found["samples"][task[0]], plain["samples"][task[0]], strict=True):
        assert a["resps"] == b["resps"]
    assert AutoConfig.from_pretrained(made.export).max_position_embeddings == 1_048_576  # 64 of these at once


def knowing(made, answer) -> HFLM:
    """The export, but its generation says `answer(prompt, right)`."""
    tokenizer = AutoTokenizer.from_pretrained(made.export)
    model = AutoModelForCausalLM.from_pretrained(made.export)

    def generate(input_ids, **options):
        said = []
        for ids in input_ids:
            prompt = tokenizer.decode(ids, skip_special_tokens=True)
            asked = prompt.splitlines()[-1]
            pattern = r"The pass key is (\d+)" if asked.startswith("What") else rf"^{asked} (\d+)$"
            (right,) = re.findall(pattern, prompt, re.MULTILINE)
            text = answer(prompt, right)
            new = tokenizer.encode(text, add_special_tokens=False)[: options["max_length"] - len(ids)]
            said.append(torch.cat((ids, torch.tensor(new))))
        padding = tokenizer.pad_token_id
        return torch.nn.utils.rnn.pad_sequence(said, batch_first=True, padding_value=padding)

    model.generate = generate
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda prompt, right: f" {right}. Then 5 more", 1.0),
        (lambda prompt, right: f" It is {right}", 1.0),
        (lambda prompt, right: f" {(int(right) + 1) % 100_000}", 0.0),
        (lambda prompt, right: f" {right}7", 0.0),
        (lambda prompt, right: f" {right[:4]}", 0.0),
        (lambda prompt, right: " no number", 0.0),
        (lambda prompt, right: "", 0.0),
    ],
)
def test_scores_of_a_model_that_knows_the_answers_and_of_one_that_does_not(made, answer, expected):
    results = harness(made, ["infini_passkey", "infini_kv"], model=knowing(made, answer))["results"]
    assert set(results) == {"infini_passkey", "infini_kv", *RECALL}
    for name in results:
        metrics = {
            key: value for key, value in results[name].items() if key.endswith(",number") and "stderr" not in key
        }
        wanted = {f"{metric},number": expected for metric in ("exact_match", *(f"depth_{d}" for d in DEPTHS))}
        assert metrics == wanted


def test_a_depth_is_scored_by_its_own_prompts(made):
    def at_the_start(prompt: str, right: str) -> str:
        return right if prompt.index(right) < len(prompt) / 3 else "0"

    results = harness(made, ["infini_passkey", "infini_kv"], model=knowing(made, at_the_start))["results"]
    for name in results:
        found = [results[name][f"{metric},number"] for metric in ("depth_0", "depth_0.5", "depth_1", "exact_match")]
        assert found == pytest.approx([1, 0, 0, 1 / 3])
