"""Several validation datasets by name: each has the metrics that it has as the only one."""

import json
import signal

import pytest
from lightning import Trainer
from lightning.pytorch.loggers import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.__main__ import main as data_prep
from infini_train.cli import train
from infini_train.data.datamodule import LaneDataModule
from infini_train.synthetic import Vocabulary
from infini_train.training.callbacks.memory_metrics import MemoryMetrics
from infini_train.training.callbacks.recall import Recall
from infini_train.training.checkpoint_io import DirectoryIO
from infini_train.training.module import InfiniModule
from tests.helpers.datasets import make_dataset
from tests.helpers.job import run as job
from tests.helpers.results import LENGTHS, assert_identical, results
from tests.helpers.runs import fit

VOCABULARY = Vocabulary(6, 3, 4)
OPTIONS = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "8", "--checkpoint.every_n_steps", "2"]


class Recorded(Logger):
    """Keeps what is logged."""

    name = version = "recorded"

    def __init__(self):
        super().__init__()
        self.values = {}

    def log_metrics(self, metrics, step=None):
        assert not self.values.keys() & metrics.keys()
        self.values |= metrics

    def log_hyperparams(self, *args, **kwargs):
        pass


def validated(validation) -> dict[str, float]:
    sizes = {"vocab_size": VOCABULARY.size, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "memory": "selective-delta"}
    module = InfiniModule(**sizes, **heads, segment_length=8, initializer_range=0.5)
    options = {"segment_length": 8, "segments_per_window": 3, "micro_batch_size": 3, "num_workers": 0}
    data = LaneDataModule("none", validation, **options)
    logger = Recorded()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [MemoryMetrics(), Recall(2)]
    trainer = Trainer(
        accelerator="cpu", devices=1, plugins=[DirectoryIO()], logger=logger, callbacks=callbacks, **quiet
    )
    trainer.validate(module, data)
    assert trainer.callback_metrics.keys() <= logger.values.keys()
    return logger.values


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Documents of random tokens, and a synthetic task, which has a recall to measure too."""
    root = tmp_path_factory.mktemp("named")
    make_dataset(root / "books", [300, 2, 45, 7], vocab_size=VOCABULARY.size)
    sizes = "--documents 20 --tokens 60 --shortest 15 --keys 6 --fewest 2 --values 3 --noise-tokens 4"
    words = ["synth", "--out", str(root / "task"), *sizes.split(), "--validation-fraction", "0.2"]
    assert data_prep(words) == 0
    task = root / "task" / "valid"
    index = json.loads((task / "index.json").read_text())
    make_dataset(root / "code", [33, 64], vocab_size=VOCABULARY.size, seed=1)
    for name in ("books", "code"):  # all datasets of a run have one tokenizer
        other = json.loads((root / name / "index.json").read_text())
        assert other["tokenizer"] != index["tokenizer"]
    return root, task


def test_each_has_the_metrics_it_has_alone_and_all_have_those_of_their_tokens(datasets):
    root, _ = datasets
    paths = {name: str(root / name) for name in ("books", "code")}
    alone = {name: validated(path) for name, path in paths.items()}
    found = validated(paths)
    for name, values in alone.items():
        assert {f"val/{name}/{tag.removeprefix('val/')}": x for tag, x in values.items()}.items() <= found.items()
    labels = {"books": 299 + 1 + 44 + 6, "code": 32 + 63}
    for tag in ("val/loss", "val/memory_benefit"):
        mean = sum(n * alone[name][tag] for name, n in labels.items()) / sum(labels.values())
        assert found[tag] == pytest.approx(mean)
    # Segment 0 of the documents: their first 8 tokens, each of which predicts the next if there is one.
    first = {"books": 8 + 1 + 8 + 6, "code": 8 + 8}
    mean = sum(n * alone[name]["val/segment_0"] for name, n in first.items()) / sum(first.values())
    assert found["val/segment_0"] == pytest.approx(mean)
    low, high = sorted(values["val/memory_read_norm"] for values in alone.values())
    assert low < found["val/memory_read_norm"] < high
    assert found.keys() - {f"val/{name}/{tag[4:]}" for name in alone for tag in alone[name]} == alone["books"].keys()


def test_recall_is_measured_on_each_synthetic_dataset(datasets):
    _, task = datasets
    alone = validated(str(task))
    found = validated({"a": str(task), "b": str(task)})
    for tag in ("recall", "recall_memory_off"):
        assert found[f"val/a/{tag}"] == found[f"val/b/{tag}"] == alone[f"val/{tag}"]
    assert "val/recall" not in found
    for tag in ("val/loss", "val/memory_share", "val/memory_read_norm"):
        assert found[tag] == pytest.approx(alone[tag])


def test_from_the_command_line(datasets, tmp_path, capsys):
    root, _ = datasets
    config = tmp_path / "named.yaml"
    config.write_text(f"data: {{validation: {{books: {root / 'books'}}}}}\n")
    shards = root / "books"
    words = ["--data.validation", f"{{books: {root / 'books'}, code: {root / 'code'}}}", *OPTIONS]
    done = fit(tmp_path / "run", shards, *words)
    assert done.code == 0, done.err
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0}).Reload()
    tags = set(board.Tags()["scalars"])
    assert {f"val/{name}{tag}" for name in ("", "books/", "code/") for tag in ("loss", "memory_share")} <= tags
    saved = json.loads((tmp_path / "run/checkpoints/step-00000004/metrics.json").read_text())["validation"]
    (point,) = board.Scalars("val/code/loss")
    assert saved["val/code/loss"] == pytest.approx(point.value)
    given = ["--run", str(tmp_path / "run"), "--data.train", str(shards), "--trainer.accelerator", "cpu"]
    given += ["--config", str(tmp_path / "run" / "config.yaml"), "--config", str(config)]
    capsys.readouterr()
    train(args=["validate", *given])
    shown = capsys.readouterr().out
    assert "validation loss of books, nats per token" in shown
    assert f"{saved['val/books/loss']:.4f}" in shown


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "data.validation: found a mapping without a dataset"),
        ({"a/b": "x"}, "data.validation: found the name 'a/b', expected only letters, digits"),
        ({"books": "/nowhere/at-all"}, "data.validation.books: /nowhere/at-all"),
        ({"books": ""}, "data.validation.books: found no dataset"),
    ],
)
def test_bad_mappings_are_refused(datasets, given, message):
    with pytest.raises(ValueError, match=message):
        validated(given)


def test_another_tokenizer_is_named_by_dataset(datasets):
    root, task = datasets
    message = rf"data.validation.b: found another tokenizer in {task}, expected that of {root}/books"
    with pytest.raises(ValueError, match=message):
        validated({"a": str(root / "books"), "b": str(task)})


@pytest.mark.slow
def test_a_signal_in_the_second_dataset(datasets, tmp_path):
    """The validation runs again from the first dataset; the run ends with the bits and the curves of the unbroken."""
    root, _ = datasets
    words = ["--data.validation", f"{{books: {root / 'books'}, code: {root / 'code'}}}"]
    words += ["--trainer.max_steps", "6", "--trainer.val_check_interval", "5"]
    whole = fit(tmp_path / "whole", root / "books", *words, within="validation_step")
    assert whole.code == 0, whole.err
    last = whole.instants // 2  # two validations; an instant of the last batch of the first one
    left = fit(
        tmp_path / "run", root / "books", *words, within="validation_step", die_at=last - 2, number=signal.SIGTERM
    )
    assert left.code == 128 + signal.SIGTERM, left.err
    assert fit(tmp_path / "run", root / "books", *words).code == 0
    expected, found = results(tmp_path / "whole"), results(tmp_path / "run")
    for state in (expected["state"], found["state"]):
        state.pop("loops", None)  # as in tests/resume
    assert_identical(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("context", [1, 2])
def test_two_ranks_have_the_metrics_of_one(tmp_path, context):
    make_dataset(tmp_path / "shards", LENGTHS)
    make_dataset(tmp_path / "other", [90, 12, 40], seed=1)
    words = ["--data.validation", f"{{a: {tmp_path / 'shards'}, b: {tmp_path / 'other'}}}"]
    words += [*OPTIONS, "--trainer.limit_val_batches", "1.0", "--trainer.val_check_interval", "4"]
    found = []
    for ranks, name in ((1, "one"), (2, "two")):
        more = ["--data.context_parallel", "2", "--data.micro_batch_size", "4"] if ranks * context == 4 else []
        done = job(tmp_path / name, tmp_path / "shards", ranks, "ddp" if ranks > 1 else None, *words, *more)
        assert done.code == 0, done.err
        path = tmp_path / name / "checkpoints/step-00000004/metrics.json"
        found.append(json.loads(path.read_text())["validation"])
    assert {"val/loss", "val/a/loss", "val/b/loss", "val/b/segment_0"} <= found[0].keys()
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-5)
