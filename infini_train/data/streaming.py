"""Streams webdatasets of raw text, tokenises them on the fly and packs the documents into lanes as they arrive.

This is for quick trials and for webdatasets that exist already. A resumed run reads the data from the start again;
`LaneDataModule` resumes exactly.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from lightning import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from infini_train import preemption
from infini_train.data.batches import IGNORED, Batch
from infini_train.tokenizer.loading import Tokenizer, load_tokenizer

from .datamodule import trainer_faults


class StreamedBatches(IterableDataset[Batch]):
    """Yields this rank's micro-batches; documents are numbered in order of arrival.

    Args:
        data: the shards and the shape of the batches.
        steps: optimizer steps of the whole run.
        accumulate: micro-batches of a step on each rank.
        rank, world_size: this rank, and the number of ranks.
    """

    def __init__(self, data: "StreamingDataModule", steps: int, accumulate: int, rank: int, world_size: int):
        self.data, self.steps, self.accumulate, self.world_size = data, steps, accumulate, world_size
        self.urls = data.urls[rank::world_size]
        self.first_lane = rank * accumulate * data.micro_batch_size

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        documents, rows = self._documents(), self.data.micro_batch_size
        # What each lane has left of documents that it has begun, int64 [4, tokens]; the rows are token, label,
        # whether a document starts here, and the number of the document.
        lanes = [np.empty((4, 0), np.int64)] * (rows * self.accumulate)
        for _ in range(self.steps):
            windows = []
            for number, lane in enumerate(lanes):
                while lane.shape[1] < self.data.window:
                    lane = np.concatenate([lane, next(documents)], axis=1)
                window, lanes[number] = np.split(lane, [self.data.window], axis=1)
                windows.append(window)
            labels = sum(int((window[1] != IGNORED).sum()) for window in windows)
            for group in range(self.accumulate):
                ids, next_ids, starts, docs = torch.from_numpy(np.stack(windows[group * rows :][:rows], axis=1))
                yield Batch(
                    input_ids=ids,
                    labels=next_ids,
                    starts=starts.bool() if starts.any() else None,
                    lane_ids=self.first_lane + group * rows + torch.arange(rows),
                    docs=docs,
                    step_tokens=labels * self.world_size,
                    cursor_after=None,
                )

    def _documents(self) -> Iterator[np.ndarray]:
        """Yield documents in the form of lanes, int64 [4, tokens], pass after pass over this rank's shards."""
        tokenizer = load_tokenizer(Path(self.data.tokenizer))
        doc = 0
        while True:  # webdataset raises an error if a pass has no samples, so this cannot spin
            for sample in wds.WebDataset(self.urls, shardshuffle=False, nodesplitter=None, workersplitter=None):
                tokens = tokenizer.encode(text_of(sample, self.data.text_field)).astype(np.int64)
                starts = np.arange(len(tokens)) == 0
                yield np.stack([tokens, [*tokens[1:], IGNORED], starts, np.full(len(tokens), doc)])
                doc += 1


def text_of(sample: dict[str, Any], field: str) -> str:
    """Return the text of a webdataset sample, from its .txt member or the given field of its .json member.

    Raises:
        ValueError: the sample has no text; names the shard and the key.
    """
    try:
        text = sample["txt"].decode() if "txt" in sample else json.loads(sample["json"])[field]
        if not isinstance(text, str):
            raise TypeError(f"{field} is {type(text).__name__}, not a string")
    except (KeyError, TypeError, ValueError) as e:  # ValueError: the member is not UTF-8 or not JSON
        where = f"{sample['__url__']}: {sample['__key__']}"
        raise ValueError(f"{where}: found {e!r}, expected UTF-8 .txt or .json with {field!r}") from e
    return text


class StreamingDataModule(LightningDataModule):
    """Streams batches of raw-text webdatasets.

    Batches differ from those of `LaneDataModule` in two ways: `cursor_after` is None, and on several ranks
    `step_tokens` is this rank's own count times the number of ranks, because no rank knows what the others read.

    Args:
        urls: webdataset shards in webdataset's notation, such as `data/{00..63}.tar`. Each shard goes to one rank.
        tokenizer: sentencepiece model, or a directory with a Hugging Face tokenizer.
        text_field: field of .json members that holds the text; .txt members need none.
        segment_length, segments_per_window, lanes, micro_batch_size: see LaneDataModule.
    """

    def __init__(
        self,
        urls: str,
        tokenizer: str,
        text_field: str = "text",
        segment_length: int = 2048,
        segments_per_window: int = 16,
        lanes: int = 8,
        micro_batch_size: int = 1,
    ):
        super().__init__()
        self.urls: list[str] = wds.shardlists.expand_urls(urls)
        self.tokenizer, self.text_field = tokenizer, text_field
        self.segment_length, self.segments_per_window = segment_length, segments_per_window
        self.window = segment_length * segments_per_window
        self.lanes, self.micro_batch_size, self.context_parallel = lanes, micro_batch_size, 1

    def setup(self, stage: str) -> None:
        sizes = ("segment_length", "segments_per_window", "lanes", "micro_batch_size")
        wrong = [f"data.{name}: found {n}, expected at least 1" for name in sizes if (n := getattr(self, name)) < 1]
        wrong += trainer_faults(self.trainer, self.lanes, self.micro_batch_size)
        paths = [url for url in self.urls if ":" not in url]
        wrong += [f"data.urls: found no file {path}, expected a shard" for path in paths if not Path(path).is_file()]
        if not Path(self.tokenizer).exists():
            wrong.append(f"data.tokenizer: found nothing at {self.tokenizer}, expected a tokenizer")
        assert self.trainer is not None
        if (ranks := self.trainer.world_size) > len(self.urls):
            wrong.append(f"data.urls: found {len(self.urls)} shards, expected at least one for each of {ranks} ranks")
        if wrong:
            raise ValueError("\n".join(wrong))
        rank_zero_warn("Streamed data: a resumed run starts the data over. For exact resume make a dataset of it.")

    @property
    def tokenizer_file(self) -> str:
        """Name of the tokenizer's file, which tells what kind of tokenizer it is."""
        return "tokenizer.json" if Path(self.tokenizer).is_dir() else Path(self.tokenizer).name

    def opening(self, tokens: int) -> tuple[Tokenizer, np.ndarray]:
        """Return the tokenizer, and the first token of any document: a stream has no place to return to."""
        tokenizer = load_tokenizer(Path(self.tokenizer))
        return tokenizer, np.array([tokenizer.bos_id])

    def check_model(self, vocab_size: int, tokenizer_sha256: str | None = None) -> None:
        """Raise ValueError if a model of this vocabulary (and tokenizer, if given) cannot take these documents."""
        tokenizer = load_tokenizer(Path(self.tokenizer))
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"model.vocab_size: found {vocab_size}, expected at least {tokenizer.vocab_size}, that of "
                f"{self.tokenizer}"
            )
        if tokenizer_sha256 not in (None, tokenizer.sha256):
            raise ValueError(f"data.tokenizer: found {self.tokenizer}, expected the model's")

    def train_dataloader(self) -> DataLoader[Batch]:
        trainer = self.trainer
        assert trainer is not None
        accumulate, ranks = trainer.accumulate_grad_batches, trainer.world_size
        batches = StreamedBatches(self, trainer.max_steps, accumulate, trainer.global_rank, ranks)
        return DataLoader(
            batches,
            batch_size=None,
            num_workers=1,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=preemption.shield,
            generator=torch.Generator(),
        )
