"""Streamed batches against the texts that went in, laid token after token into lanes."""

import io
import json
from collections import deque
from itertools import cycle

import pytest
import sentencepiece
import torch
import webdataset as wds
from lightning import Trainer

from infini_train import preemption
from infini_train.cli import train
from infini_train.data.streaming import StreamedBatches, StreamingDataModule
from infini_train.hf.commands import export
from infini_train.run_files import latest

TEXTS = ["Ein Bild sagt mehr als tausend Worte.", "Öl", "", "a b c d e f g", "The quick brown fox jumps! " * 9, "x y"]
LANES, ROWS, SEGMENT, SEGMENTS, STEPS = 6, 2, 4, 2, 25


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([t for t in TEXTS if t]),
        model_writer=model,
        vocab_size=292,
        byte_fallback=True,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return str(path)


def write(path, samples):
    with wds.TarWriter(str(path)) as tar:
        for number, sample in enumerate(samples):
            tar.write({"__key__": f"{number:04d}", **sample})


@pytest.fixture
def shards(tmp_path):
    samples = [
        {"json": json.dumps({"text": t}).encode()} if i % 2 else {"txt": t.encode()} for i, t in enumerate(TEXTS)
    ]
    write(tmp_path / "0.tar", samples[:4])
    write(tmp_path / "1.tar", samples[4:])
    return f"{tmp_path}/{{0..1}}.tar"


def stream(urls, tokenizer, **options):
    options = {"lanes": LANES, "micro_batch_size": ROWS} | options
    data = StreamingDataModule(urls, tokenizer, segment_length=SEGMENT, segments_per_window=SEGMENTS, **options)
    data.trainer = Trainer(accelerator="cpu", logger=False, max_steps=STEPS, accumulate_grad_batches=LANES // ROWS)
    data.setup("fit")
    return data.train_dataloader()


@pytest.mark.filterwarnings("ignore:Streamed data")
def test_packs_the_texts_in_order(shards, tokenizer):
    model = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
    encoded = [[model.bos_id(), *model.encode(text), model.eos_id()] for text in TEXTS]
    documents = enumerate(cycle(encoded))

    loader = stream(shards, tokenizer)
    batches = list(loader)
    assert len(loader) == len(batches) == STEPS * LANES // ROWS
    lanes = [deque() for _ in range(LANES)]
    last = 0
    for step in range(STEPS):
        of_step = batches[step * 3 : step * 3 + 3]
        labels = 0
        for lane in range(LANES):
            batch, row = of_step[lane // ROWS], lane % ROWS
            assert batch["lane_ids"][row] == lane
            assert batch["cursor_after"] is None
            for t in range(SEGMENT * SEGMENTS):
                if not lanes[lane]:
                    last, tokens = next(documents)
                    lanes[lane].extend(
                        (last, *x) for x in zip(tokens, [*tokens[1:], -100], range(len(tokens)), strict=True)
                    )
                doc, token, label, position = lanes[lane].popleft()
                found = [int(batch[name][row, t]) for name in ("docs", "input_ids", "labels")]
                assert found == [doc, token, label]
                assert (batch["starts"] is not None and bool(batch["starts"][row, t])) == (position == 0)
                labels += label != -100
        assert {batch["step_tokens"] for batch in of_step} == {labels}
    assert last > 2 * len(TEXTS)  # several passes


@pytest.mark.filterwarnings("ignore:Streamed data")
@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (
            {"json": b'{"body": "x"}'},
            r"2.tar: 0000: found KeyError\('text'\), expected UTF-8 .txt or .json with 'text'",
        ),
        ({"json": b'{"text": 5}'}, "2.tar: 0000: .* not a string"),
        ({"json": b'{"te'}, "2.tar: 0000: found JSONDecodeError"),
        ({"txt": b"\xff\xfe"}, "2.tar: 0000: found UnicodeDecodeError"),
        ({"md": b"x"}, r"2.tar: 0000: found KeyError\('json'\)"),
        (None, "No samples found"),
    ],
)
def test_names_a_document_without_text(tmp_path, tokenizer, sample, message):
    write(tmp_path / "2.tar", [sample] if sample else [])
    with pytest.raises(ValueError, match=message):
        next(iter(stream(str(tmp_path / "2.tar"), tokenizer).dataset))  # in a worker torch takes 5 s to give up


def test_lists_all_that_is_wrong(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"data\.lanes: found 5") as e:
        stream(f"{tmp_path}/{{0..1}}.tar", str(tmp_path / "none.model"), lanes=5)
    for line in (
        f"data.urls: found no file {tmp_path}/0.tar, expected a shard",
        f"data.urls: found no file {tmp_path}/1.tar, expected a shard",
        f"data.tokenizer: found nothing at {tmp_path}/none.model, expected a tokenizer",
    ):
        assert line in str(e.value)


def test_sizes_that_hold_nothing_are_refused(shards, tokenizer):
    sizes = {"segment_length": 4, "segments_per_window": 0, "lanes": 0, "micro_batch_size": 0}
    data = StreamingDataModule(shards, tokenizer, **sizes)
    data.trainer = Trainer(accelerator="cpu", logger=False, max_steps=STEPS)
    with pytest.raises(ValueError, match="found 0") as refused:
        data.setup("fit")
    assert str(refused.value).splitlines() == [
        f"data.{name}: found 0, expected at least 1" for name, size in sizes.items() if size == 0
    ]


@pytest.mark.filterwarnings("ignore:Streamed data")
def test_its_worker_is_shielded_from_signals(shards, tokenizer):
    assert stream(shards, tokenizer).worker_init_fn is preemption.shield


def test_says_that_it_does_not_resume(shards, tokenizer):
    with pytest.warns(UserWarning, match="a resumed run starts the data over"):
        stream(shards, tokenizer)


def test_refuses_a_small_vocabulary(shards, tokenizer):
    data = StreamingDataModule(shards, tokenizer)
    data.check_model(292)
    with pytest.raises(ValueError, match=r"model\.vocab_size: found 291, expected at least 292"):
        data.check_model(291)
    with pytest.raises(ValueError, match=r"data\.tokenizer: found .*, expected the model's"):
        data.check_model(292, "0" * 64)


def test_draws_nothing_from_the_global_random_state(shards, tokenizer):
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="Streamed data"):
        next(iter(stream(shards, tokenizer)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:Streamed data")
def test_ranks_take_their_own_shards_and_lanes(shards, tokenizer):
    data = StreamingDataModule(shards, tokenizer, "text", SEGMENT, SEGMENTS, lanes=2 * LANES, micro_batch_size=ROWS)
    model = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
    for rank, (texts, lanes) in enumerate([(TEXTS[:4], range(LANES)), (TEXTS[4:], range(LANES, 2 * LANES))]):
        batches = list(StreamedBatches(data, steps=2, accumulate=LANES // ROWS, rank=rank, world_size=2))
        for step in (batches[:3], batches[3:]):
            assert torch.cat([batch["lane_ids"] for batch in step]).tolist() == list(lanes)
            labels = sum(int((batch["labels"] != -100).sum()) for batch in step)
            assert {batch["step_tokens"] for batch in step} == {2 * labels}
        first = [model.bos_id(), *model.encode(texts[0])][: SEGMENT * SEGMENTS]
        assert batches[0]["input_ids"][0].tolist() == first


@pytest.mark.filterwarnings("ignore:Streamed data")
def test_command_trains_on_a_stream(shards, tokenizer, tmp_path):
    """`infini-train stream`, and that its run, which names no dataset, is exported with one or not at all."""
    words = ["--run", tmp_path / "run", "--data.urls", shards, "--data.tokenizer", tokenizer, "--data.lanes", LANES]
    words += [
        "--data.micro_batch_size",
        ROWS,
        "--data.segment_length",
        SEGMENT,
        "--data.segments_per_window",
        SEGMENTS,
    ]
    words += ["--model.vocab_size", 292, "--model.hidden_size", 16, "--model.intermediate_size", 16]
    words += ["--model.num_hidden_layers", 1, "--model.num_attention_heads", 2]
    words += ["--model.num_key_value_heads", 1, "--trainer.max_steps", 4]
    words += ["--trainer.accelerator", "cpu", "--trainer.accumulate_grad_batches", LANES // ROWS]
    train(args=["fit", *map(str, words)], data=StreamingDataModule)
    assert latest(tmp_path / "run" / "checkpoints").name == "step-00000004"
    with pytest.raises(ValueError, match="trained on a stream of texts; --dataset must name shards"):
        export(tmp_path / "run" / "checkpoints", tmp_path / "out")
