"""Recall at validation equals that of whole documents read alone, and training does not notice it."""

import json

import pytest
import torch
from lightning import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.__main__ import main as data_prep
from infini_train.data.datamodule import LaneDataModule
from infini_train.synthetic import EVALUATION, PasskeyTask, RecallTask, Vocabulary, documents
from infini_train.training.callbacks.recall import Recall
from infini_train.training.checkpoint_format import read_model
from infini_train.training.checkpoint_io import DirectoryIO
from infini_train.training.module import InfiniModule
from tests.helpers.datasets import make_dataset
from tests.helpers.runs import fit
from tests.helpers.synthetic_replay import replay, words

S, COUNT = 8, 6
VOCABULARY = Vocabulary(6, 3, 4)


def synthetic(directory, *options: str):
    """A dataset of documents of at most 60 tokens, 6 keys, 3 values, 4 noise tokens."""
    sizes = "--documents 20 --tokens 60 --shortest 15 --keys 6 --fewest 2 --values 3 --noise-tokens 4"
    given = ["synth", "--out", str(directory), *sizes.split(), *options, "--validation-fraction", "0.2"]
    assert data_prep(given) == 0
    return directory / "train", directory / "valid"


def validated(
    path, segment_length: int = S, sliding_window: int | None = None
) -> tuple[InfiniModule, dict[str, float]]:
    """A model that answers at random, but with an answer always, and what its validation gives."""
    sizes = {"vocab_size": VOCABULARY.size, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    lengths = {"segment_length": segment_length, "sliding_window": sliding_window}
    module = InfiniModule(**sizes, **heads, **lengths, initializer_range=0.5)
    module.configure_model()
    answers = torch.zeros(VOCABULARY.size, 1)
    answers[4:14] = answers[VOCABULARY.first_value : VOCABULARY.first_noise] = 1
    with torch.no_grad():
        module.model.lm_head.weight *= answers
    options = {"segment_length": segment_length, "segments_per_window": 3, "micro_batch_size": 3, "num_workers": 0}
    data = LaneDataModule(str(path), str(path), **options)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    probe = Recall(COUNT)
    trainer = Trainer(accelerator="cpu", devices=1, plugins=[DirectoryIO()], callbacks=[probe], **quiet)
    trainer.validate(module, data)
    return module, {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize(
    ("options", "task", "window"),
    [
        (["--change", "0.2", "--passkey", "0.5"], RecallTask(60, change=0.2), None),
        (["--passkey", "1", "--thick", "1"], PasskeyTask(60, thick=1.0), None),
        (["--change", "0.2"], RecallTask(60, change=0.2), S),
    ],
)
def test_recall_equals_documents_read_alone(tmp_path, options, task, window):
    _, path = synthetic(tmp_path / "data", *options)
    module, found = validated(path, sliding_window=window)
    hits, answers = {"on": 0, "off": 0}, 0
    with torch.no_grad():
        for document in documents(task, VOCABULARY, COUNT, seed=0, stream=EVALUATION):
            ids = torch.from_numpy(document.tokens_T.astype("int64"))
            logits = {"on": module.model(ids[None]).logits[0]}
            if window is None:  # otherwise segments need the keys of the one before, computed with the memory
                logits["off"] = torch.cat([module.model(part[None]).logits[0] for part in ids.split(S)])
            places = [p for p, (only, _) in replay(words(document, VOCABULARY), S, window).items() if only]
            answers += len(places)
            for mode, choice in logits.items():
                hits[mode] += sum(choice[p - 1].argmax().item() == ids[p].item() for p in places)
    assert answers > 30
    assert hits["on"] > 0
    assert found["val/recall"] == pytest.approx(hits["on"] / answers)
    if window is None:
        assert 0 < hits["on"] != hits["off"] > 0
        assert found["val/recall_memory_off"] == pytest.approx(hits["off"] / answers)


def test_nothing_is_logged_where_nothing_is_asked(tmp_path):
    make_dataset(tmp_path / "text", [30, 9], vocab_size=VOCABULARY.size)
    assert "val/recall" not in validated(tmp_path / "text")[1]
    _, path = synthetic(tmp_path / "data")
    assert "val/recall" not in validated(path, segment_length=64)[1]


def test_training_does_not_notice(tmp_path):
    """A run that asks at every second step ends in the same weights and memories as one that never validates."""
    train, valid = synthetic(tmp_path / "data")
    options = ["--data.validation", str(valid), "--trainer.max_steps", "4", "--model.vocab_size", "40"]
    asking = ["--trainer.val_check_interval", "4", "--checkpoint.every_n_steps", "4"]
    for name, extra in (("asked", asking), ("never", [*asking, "--trainer.limit_val_batches", "0"])):
        run = fit(tmp_path / name, train, *options, *extra)
        assert run.code == 0, run.err
    last = [tmp_path / name / "checkpoints" / "step-00000004" for name in ("asked", "never")]
    weights = [read_model(path)[1] for path in last]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
    for name in ("lanes-00000-of-00001.safetensors", "state-00000-of-00001.safetensors"):
        first, second = ((path / name).read_bytes() for path in last)
        assert first == second, name
    board = EventAccumulator(str(tmp_path / "asked" / "tensorboard")).Reload()
    for tag in ("val/recall", "val/recall_memory_off"):
        points = {event.step: event.value for event in board.Scalars(tag)}
        assert points.keys() == {2, 4}
        saved = json.loads((last[0] / "metrics.json").read_text())["validation"]  # that of the checkpoint's step
        assert (saved["step"], saved[tag]) == (4, points[4])
