"""Batches against the documents that were written, over ranks, workers and Lightning's own resume."""

import itertools
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset

from infini_train import preemption
from infini_train.data.datamodule import LaneDataModule
from infini_train.data.lanes import Cursor
from tests.helpers.batches import LANES, LENGTHS, SEED, SEGMENT, SEGMENTS, STEPS, WINDOW, check_step, datamodule
from tests.helpers.datasets import make_dataset
from tests.helpers.lane_reference import reference


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "set"
    return root, make_dataset(root, LENGTHS)


@pytest.mark.parametrize(
    ("world_size", "rows", "workers"),
    [(1, 8, 0), (1, 2, 2), (2, 4, 0), (2, 1, 2), (4, 1, 0), (8, 1, 0), (8, 1, 2)],
)
def test_same_global_batches_at_any_world_size_and_workers(dataset, world_size, rows, workers):
    root, documents = dataset
    modules = [
        datamodule(root, world_size=world_size, rank=rank, rows=rows, workers=workers) for rank in range(world_size)
    ]
    loaders = [module.train_dataloader() for module in modules]
    turns = LANES // (rows * world_size)
    assert {len(loader) for loader in loaders} == {STEPS * turns}
    batches = [list(loader) for loader in loaders]
    assert {len(b) for b in batches} == {STEPS * turns}
    per_rank = LANES // world_size
    steps = itertools.islice(reference(LENGTHS, LANES, WINDOW, SEED), STEPS)
    for step, expected in enumerate(steps):
        of_step = [b[step * turns : (step + 1) * turns] for b in batches]
        for rank, group in enumerate(of_step):
            assert torch.cat([b["lane_ids"] for b in group]).tolist() == [
                *range(rank * per_rank, (rank + 1) * per_rank)
            ]
        check_step([b for group in of_step for b in group], expected, documents)
        cursors = [Cursor.from_dict(b["cursor_after"]) for group in of_step for b in group]
        assert all(cursor == cursors[0] and cursor.step == step + 1 for cursor in cursors)
    assert cursors[0].queue_positions()[0].epoch >= 3


@settings(max_examples=15)
@given(at=st.integers(0, STEPS - 1), world_size=st.sampled_from([1, 2, 4]))
def test_resumes_from_any_cursor_at_any_world_size(dataset, at, world_size):
    root, documents = dataset
    batches = list(itertools.islice(datamodule(root, rows=2).train_dataloader(), at * 4))
    cursor = Cursor.from_dict(batches[-1]["cursor_after"]) if batches else None
    modules = [
        datamodule(root, world_size=world_size, rank=rank, rows=2, cursor=cursor) for rank in range(world_size)
    ]
    turns = LANES // (2 * world_size)
    rest = [list(module.train_dataloader()) for module in modules]
    assert {len(r) for r in rest} == {(STEPS - at) * turns}
    steps = itertools.islice(reference(LENGTHS, LANES, WINDOW, SEED), at, STEPS)
    for step, expected in enumerate(steps):
        check_step([b for r in rest for b in r[step * turns : (step + 1) * turns]], expected, documents)


class Recorder(LightningModule):
    """A model that learns nothing and writes down what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[list[int], list[int], int]] = []
        self.validated: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch["lane_ids"].tolist(), batch["input_ids"].flatten().tolist(), batch_idx))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch["docs"].flatten().tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(root, where, steps, *, resume_at=None, workers=0):
    """12 rows in 3 turns of 4, with Lightning's own checkpoint of every step."""
    options = {"segment_length": SEGMENT, "segments_per_window": SEGMENTS, "seed": SEED}
    data = LaneDataModule(str(root), str(root), lanes=12, micro_batch_size=4, num_workers=workers, **options)
    path = None
    if resume_at:
        data.cursor = cursor_at(root, resume_at)
        path = where / f"epoch=0-step={resume_at}.ckpt"
    model = Recorder()
    trainer = Trainer(
        max_steps=steps,
        accumulate_grad_batches=3,
        accelerator="cpu",
        logger=False,
        callbacks=[ModelCheckpoint(where, every_n_train_steps=1, save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=6,
    )
    state = torch.get_rng_state()
    trainer.fit(model, data, ckpt_path=path)
    assert torch.equal(torch.get_rng_state(), state)  # loaders draw nothing from it
    assert trainer.global_step == steps
    return model


def cursor_at(root, step):
    module = datamodule(root, rows=4, lanes=12, steps=step)
    return Cursor.from_dict(list(module.train_dataloader())[-1]["cursor_after"])


@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_resumes_exactly(dataset, tmp_path, workers):
    """A run of 7 steps, and one of 7 resumed at step 3, also by a run that had ended there."""
    root, _ = dataset
    whole = fit(root, tmp_path / "whole", 7)
    assert len(whole.seen) == 21
    resumed = fit(root, tmp_path / "whole", 7, resume_at=3, workers=workers)
    assert resumed.seen == whole.seen[9:]
    fit(root, tmp_path / "short", 3)
    longer = fit(root, tmp_path / "short", 7, resume_at=3, workers=workers)
    assert longer.seen == whole.seen[9:]
    again = fit(root, tmp_path / "whole", 7, resume_at=7)
    assert not again.seen


@pytest.mark.parametrize("limit", [None, 1, 10, 25])
@pytest.mark.parametrize(("world_size", "rows"), [(1, 1), (1, 3), (2, 2), (4, 4)])
def test_validation_reads_every_document_once(dataset, world_size, rows, limit):
    root, documents = dataset
    loaders = []
    for rank in range(world_size):
        module = datamodule(
            root,
            validation=str(root),
            world_size=world_size,
            rank=rank,
            rows=rows,
            stage="validate",
            limit_validation_tokens_per_document=limit,
        )
        loaders.append(list(module.val_dataloader()))
    assert len({len(loader) for loader in loaders}) == 1
    read: dict[int, list[int]] = {doc: [] for doc in range(len(documents))}
    for together in zip(*loaders, strict=True):
        assert len({batch["input_ids"].shape for batch in together}) == 1
        assert {batch["step_tokens"] for batch in together} == {
            sum(int((batch["labels"] != -100).sum()) for batch in together)
        }
        for rank, batch in enumerate(together):
            assert batch["lane_ids"].tolist() == list(range(rank * rows, (rank + 1) * rows))
            assert batch["cursor_after"] is None
            assert batch["input_ids"].shape[1] % SEGMENT == 0
            assert batch["input_ids"].shape[1] <= WINDOW
            for row in range(rows):
                held = set(batch["docs"][row].tolist()) - {-1}
                assert len(held) <= 1
                count = int((batch["docs"][row] >= 0).sum())
                assert (batch["docs"][row, count:] == -1).all()
                assert (batch["labels"][row, count:] == -100).all()
                for t in range(count):
                    (doc,) = held
                    position = len(read[doc])
                    read[doc].append(int(batch["input_ids"][row, t]))
                    last = position + 1 == len(documents[doc])
                    assert batch["labels"][row, t] == (-100 if last else documents[doc][position + 1])
                    assert (batch["starts"] is not None and bool(batch["starts"][row, t])) == (position == 0)
                    assert batch["segment_index"][row, t // SEGMENT] == position // SEGMENT
                assert (batch["segment_index"][row, -(-count // SEGMENT) :] == -1).all()
    for doc, tokens in read.items():
        assert tokens == documents[doc][:limit].tolist()


def test_carried_rows_keep_their_document(dataset):
    """A document that goes on in the next window does so in the same row, with no other in between."""
    root, _ = dataset
    module = datamodule(root, validation=str(root), rows=3, stage="validate")
    rows: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for batch in module.val_dataloader():
        for row in rows:
            rows[row] += [doc for doc, _ in itertools.groupby(batch["docs"][row].tolist()) if doc >= 0]
    runs = [doc for row in rows.values() for doc, _ in itertools.groupby(row)]
    assert sorted(runs) == list(range(len(LENGTHS)))


def test_lists_all_that_is_wrong(tmp_path, dataset):
    root, _ = dataset
    module = LaneDataModule(str(tmp_path / "none"), segment_length=0, lanes=7, micro_batch_size=2, num_workers=-1)
    module.trainer = Trainer(
        accelerator="cpu", logger=False, accumulate_grad_batches=2, max_steps=-1, max_epochs=3, limit_train_batches=5
    )
    with pytest.raises(ValueError, match=r"data\.segment_length: found 0") as e:
        module.setup("fit")
    for part in (
        f"data.train: {tmp_path / 'none'}",
        "data.num_workers: found -1",
        "data.lanes: found 7, expected micro_batch_size * world size * accumulate_grad_batches = 2 * 1 * 2 = 4",
        "trainer.max_steps: found -1",
    ):
        assert part in str(e.value)
    with pytest.raises(ValueError, match=r"data\.validation: found no dataset"):
        datamodule(root, stage="validate")


def test_refuses_windows_that_ranks_cannot_share(dataset):
    module = LaneDataModule(str(dataset[0]), segment_length=SEGMENT, segments_per_window=16, context_parallel=3)
    module.trainer = Trainer(accelerator="cpu", logger=False, max_steps=3)
    with pytest.raises(
        ValueError, match=r"data\.context_parallel: found 3, expected a divisor of data\.segments_per_window, 16"
    ) as e:
        module.setup("fit")
    assert "data.context_parallel: found 3, expected a divisor of the number of ranks, 1" in str(e.value)
    assert "expected micro_batch_size * world size / context_parallel * accumulate" in str(e.value)


def test_refuses_loops_that_start_over(dataset):
    module = LaneDataModule(str(dataset[0]), segment_length=SEGMENT, lanes=2, micro_batch_size=2)
    for limit, fine in [(0.5, False), (9, False), (10, True), (1.0, True)]:
        module.trainer = Trainer(accelerator="cpu", logger=False, max_steps=10, limit_train_batches=limit)
        if fine:
            module.setup("fit")
        else:
            with pytest.raises(ValueError, match=r"trainer\.limit_train_batches"):
                module.setup("fit")


def test_refuses_a_second_pass(dataset):
    loader = datamodule(dataset[0], steps=2).train_dataloader()
    assert len(list(loader)) == 2
    with pytest.raises(RuntimeError, match="all 2 training micro-batches are used up"):
        next(iter(loader))


def test_refuses_the_cursor_of_another_dataset(dataset, tmp_path):
    root, _ = dataset
    make_dataset(tmp_path / "other", LENGTHS, seed=1)
    cursor = datamodule(root, steps=1)
    batch = next(iter(cursor.train_dataloader()))
    other = datamodule(tmp_path / "other", cursor=Cursor.from_dict(batch["cursor_after"]))
    with pytest.raises(ValueError, match=r"cursor.fingerprint: found \w+, expected \w+"):
        other.train_dataloader()


def test_refuses_another_vocabulary_or_tokenizer(dataset, tmp_path):
    root, _ = dataset
    module = datamodule(root)
    sha256 = module.index["train"].tokenizer_sha256
    module.check_model(100, sha256)
    module.check_model(128)
    with pytest.raises(ValueError, match=r"model\.vocab_size: found 99, expected at least 100.*\n.*tokenizer"):
        module.check_model(99, "0" * 64)


def test_worker_names_a_shard_lost_on_the_way(tmp_path):
    make_dataset(tmp_path / "set", LENGTHS)
    module = datamodule(tmp_path / "set", workers=1)
    (tmp_path / "set" / "shard-00002.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00002.tar: found no file, expected the shard"):
        list(module.train_dataloader())


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_refuses_lightnings_own_sampler(dataset, stage):
    module = datamodule(dataset[0], validation=str(dataset[0]), world_size=2, rows=4)
    module.trainer._accelerator_connector.use_distributed_sampler = True
    with pytest.raises(ValueError, match=r"trainer\.use_distributed_sampler: found true"):
        module.setup(stage)


def read_and_exit(root: Path, report) -> None:
    """A process that still holds its loader's iterator when it exits, as after an error."""
    batches = iter(datamodule(root, workers=1).train_dataloader())
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGUSR1, signal.SIGTERM):
        # From a third process: one that is not the worker's parent.
        assert os.spawnlp(os.P_WAIT, "kill", "kill", f"-{int(number)}", str(worker.pid)) == 0
    for _ in batches:
        pass
    report.put(worker.is_alive())
    globals()["held"] = batches


def test_only_the_parent_ends_a_worker(dataset):
    context = multiprocessing.get_context("forkserver")
    report = context.Queue()
    process = context.Process(target=read_and_exit, args=(dataset[0], report))
    process.start()
    try:
        assert report.get(timeout=180)
        process.join(30)
        assert process.exitcode == 0, "it hangs: it waits for a worker that nothing ends"
    finally:
        process.kill()


class Large(Dataset):
    """Items that no pipe holds, so that a worker waits until each is read."""

    def __getitem__(self, number: int) -> bytes:
        return bytes(1 << 20)


def read_one_and_wait(report) -> None:
    loader = DataLoader(Large(), None, sampler=range(9), num_workers=2, worker_init_fn=preemption.shield)
    batches = iter(loader)
    next(batches)
    report.put([worker.pid for worker in multiprocessing.active_children()])
    time.sleep(300)


def end_a_worker() -> None:
    """As an interpreter does that exits."""
    multiprocessing.set_start_method("fork", force=True)
    batches = iter(DataLoader(Large(), None, sampler=range(9), num_workers=1, worker_init_fn=preemption.shield))
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    time.sleep(2)  # torch's handler of SIGCHLD would raise an error here
    worker.join()


def test_a_worker_that_its_parent_ends_has_not_failed():
    process = multiprocessing.get_context("forkserver").Process(target=end_a_worker)
    process.start()
    process.join(120)
    assert process.exitcode == 0


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_workers_end_after_their_parent_was_killed():
    context = multiprocessing.get_context("forkserver")
    report = context.Queue()
    process = context.Process(target=read_one_and_wait, args=(report,))
    process.start()
    workers = report.get(timeout=180)
    assert len(workers) == 2
    time.sleep(0.5)  # until both wait for someone to read
    process.kill()
    try:
        deadline = time.monotonic() + 60
        while not all(map(has_ended, workers)):
            assert time.monotonic() < deadline, "a worker waits for ever"
            time.sleep(0.1)
    finally:
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
