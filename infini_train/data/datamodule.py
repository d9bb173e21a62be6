"""The data module: loaders of training and validation batches.

The main process plans which tokens every batch will hold (plans.py); loader workers only read them (batches.py).
"""

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from infini_train import preemption
from infini_train.tokenizer.loading import Tokenizer, load_tokenizer

from .batches import Batch, PlannedBatches
from .index import DatasetIndex
from .lanes import Cursor, LaneScheduler
from .mixture import Mixture, MixtureReader, Part, load_training_data, name_of, parts_of
from .plans import BatchPlan, LanePlans, validation_plans
from .reader import TokenReader
from .remote import is_remote, load_index, reader_of

STEPS_AHEAD = 4  # blocks of remote shards are prefetched this many steps before the loader asks for them
MIN_TOKENS_PER_RANK = 3  # under context parallelism, as a convolution reaches so far back (CONV_REACH in model/)


def trainer_faults(
    trainer: Trainer | None, lanes: int, micro_batch_size: int, context_parallel: int = 1
) -> list[str]:
    """Return a message for each option of the trainer that contradicts lanes, which are fixed and never end.

    Args:
        trainer: the trainer of the run.
        lanes: rows of the global batch.
        micro_batch_size: rows of one forward pass on one device.
        context_parallel: number of ranks that share a window.
    """
    assert trainer is not None
    wrong = []
    ranks, accumulate = trainer.world_size, trainer.accumulate_grad_batches
    once = micro_batch_size * ranks // context_parallel  # lanes in one micro-batch of all ranks
    if lanes != once * accumulate:
        product = ["micro_batch_size * world size", f"{micro_batch_size} * {ranks}"]
        if context_parallel > 1:
            product = [f"{product[0]} / context_parallel", f"{product[1]} / {context_parallel}"]
        wrong.append(
            f"data.lanes: found {lanes}, expected {product[0]} * accumulate_grad_batches = "
            f"{product[1]} * {accumulate} = {once * accumulate}"
        )
        if once and lanes and lanes % once == 0:
            wrong[-1] += f"; trainer.accumulate_grad_batches {lanes // once} would keep them"
    if trainer.max_steps < 1:
        wrong.append(
            f"trainer.max_steps: found {trainer.max_steps}, expected at least 1: lanes have no end of their own"
        )
    limit = trainer.limit_train_batches
    if limit < trainer.max_steps * accumulate if isinstance(limit, int) else limit != 1.0:
        wrong.append(
            f"trainer.limit_train_batches: found {limit}, expected none: lanes never start over; use max_steps"
        )
    return wrong


def option_of(name: str) -> str:
    """Return the option, without `data.`, that holds the validation dataset of this name."""
    return f"validation.{name}" if name else "validation"


def _reader_of(index: DatasetIndex | Mixture) -> TokenReader | MixtureReader:
    return MixtureReader(index) if isinstance(index, Mixture) else reader_of(index)


class LaneDataModule(LightningDataModule):
    """Reads long documents in lanes: each row of the global batch is a stream of documents, window after window.

    Batches (`Batch` dictionaries) do not depend on the number of ranks or workers. To resume, set `cursor` before the
    training loader is made: before `fit`, or in the hook that loads a checkpoint.

    Args:
        train: directory or URL of the training dataset, made by `infini-train prep shard`; or a list of several
            datasets with weights.
        validation: directory or URL of the validation dataset; or several by name (`{books: DIR, code: DIR}`), each
            of which has losses of its own, `val/NAME/loss`, beside `val/loss` over all of their tokens; none: no
            validation.
        segment_length: tokens of a segment, as in the model.
        segments_per_window: segments of one row in one micro-batch; gradients reach back this far.
        lanes: rows of the global batch. It must be micro_batch_size * world size * accumulate_grad_batches, divided
            by context_parallel.
        micro_batch_size: rows of one forward pass on one device, in training and validation.
        seed: seed of the order of documents.
        num_workers: processes of each rank that read ahead.
        context_parallel: number of ranks that share a window, each with consecutive segments of it
            (`model/context.py`).
        limit_validation_tokens_per_document: validate on only so many tokens at the start of each document; none: on
            all of them.
        cache: directory on a local disk, shared by all processes of a node, for blocks of remote datasets; none:
            `infini-train` in XDG_CACHE_HOME or ~/.cache.
        allow_growth: accept a training dataset that `infini-train prep append` has made larger since the checkpoint
            was written. The epoch in progress ends with the documents that it began with; later epochs have all.
        cache_gb: limit on the size of the cache, in GiB (2^30 bytes).
    """

    def __init__(
        self,
        train: str | list[Part],
        validation: str | dict[str, str] | None = None,
        segment_length: int = 2048,
        segments_per_window: int = 16,
        lanes: int = 8,
        micro_batch_size: int = 1,
        seed: int = 0,
        num_workers: int = 2,
        limit_validation_tokens_per_document: int | None = None,
        context_parallel: int = 1,
        cache: str | None = None,
        cache_gb: float = 50.0,
        allow_growth: bool = False,
    ):
        super().__init__()
        if not 0 < cache_gb < math.inf:
            raise ValueError(f"data.cache_gb: found {cache_gb}, expected a number of GiB above 0")
        self.load = partial(load_index, cache=Path(cache) if cache else None, cache_bytes=int(cache_gb * 2**30))
        named = validation if isinstance(validation, Mapping) else {"": validation}
        self.validation_names = list(named)  # the empty name stands for the only dataset
        self.given: dict[str, Any] = {"train": train} | {option_of(name): path for name, path in named.items()}
        self.segment_length, self.segments_per_window = segment_length, segments_per_window
        self.lanes, self.micro_batch_size = lanes, micro_batch_size
        self.seed, self.num_workers, self.context_parallel = seed, num_workers, context_parallel
        self.limit_validation_tokens_per_document = limit_validation_tokens_per_document
        self.allow_growth = allow_growth
        self.cursor: Cursor | None = None
        self.index: dict[str, DatasetIndex | Mixture] = {}

    @property
    def window(self) -> int:
        """Tokens of one row in one micro-batch, over all ranks that share the window."""
        return self.segment_length * self.segments_per_window

    def setup(self, stage: str) -> None:
        """Load the indexes. Raises ValueError that lists everything wrong with the options and the datasets."""
        assert self.trainer is not None
        wrong = self._wrong_options()
        if stage == "fit" and self.context_parallel >= 1:
            wrong += trainer_faults(self.trainer, self.lanes, self.micro_batch_size, self.context_parallel)
        if self.trainer.world_size > 1 and self.trainer._accelerator_connector.use_distributed_sampler:
            wrong.append(
                "trainer.use_distributed_sampler: found true, expected false: rows are shared out among ranks already"
            )
        for option, given in self.given.items():
            if option == "train" and stage != "fit":
                continue
            if given:
                try:
                    self.index[option] = load_training_data(given, self.load)
                    self.index[option].check_files()
                except (OSError, ValueError) as e:
                    wrong.append(f"data.{option}: {e}")
            elif option != "validation" or stage != "fit":
                wrong.append(f"data.{option}: found no dataset, expected --data.{option} DIRECTORY")
        first = next(iter(self.index), "")
        for option, index in self.index.items():
            if index.tokenizer_sha256 != self.index[first].tokenizer_sha256:
                wrong.append(
                    f"data.{option}: found another tokenizer in {self.given[option]}, expected that of "
                    f"{self.given[first]}"
                )
        if stage == "fit" and isinstance(train := self.index.get("train"), Mixture):
            needed, found = self.trainer.max_steps * self.lanes * self.window, train.tokens_to_read
            if found is not None and found < needed:
                wrong.append(
                    f"data.train: found {found:,} tokens in all epochs, expected {needed:,} for trainer.max_steps"
                )
        if wrong:
            raise ValueError("\n".join(wrong))

    def _wrong_options(self) -> list[str]:
        least = {"segment_length": 1, "segments_per_window": 1, "lanes": 1, "micro_batch_size": 1, "num_workers": 0}
        least["context_parallel"] = 1
        if self.limit_validation_tokens_per_document is not None:
            least["limit_validation_tokens_per_document"] = 1
        found = {name: getattr(self, name) for name in least}
        wrong = [f"data.{k}: found {v}, expected at least {least[k]}" for k, v in found.items() if v < least[k]]
        if not 0 <= self.seed < 2**63:
            wrong.append(f"data.seed: found {self.seed}, expected 0 to 2**63 - 1")
        if not self.validation_names:
            wrong.append(
                "data.validation: found a mapping without a dataset, expected at least one, or none instead of it"
            )
        wrong += [
            f"data.validation: found the name {name!r}, expected only letters, digits and . _ - in a dataset's name"
            for name in self.validation_names
            if not re.fullmatch(r"[\w.-]*", name)
        ]
        if wrong or self.context_parallel == 1:
            return wrong
        assert self.trainer is not None
        for name, n in (
            ("data.segments_per_window", self.segments_per_window),
            ("the number of ranks", self.trainer.world_size),
        ):
            if n % self.context_parallel:
                wrong.append(
                    f"data.context_parallel: found {self.context_parallel}, expected a divisor of {name}, {n}"
                )
        if self.window // self.context_parallel < MIN_TOKENS_PER_RANK:
            wrong.append(
                f"data.context_parallel: found {self.context_parallel}, expected at most "
                f"{self.window // MIN_TOKENS_PER_RANK}: each rank needs {MIN_TOKENS_PER_RANK} tokens of a window"
            )
        return wrong

    @property
    def validation(self) -> dict[str, DatasetIndex | Mixture]:
        """The validation datasets by name, in the order of their loaders; the only one may have the empty name."""
        options = {name: option_of(name) for name in self.validation_names}
        return {name: self.index[option] for name, option in options.items() if option in self.index}

    @property
    def validates(self) -> bool:
        """Whether there is a validation dataset."""
        return any(self.given[option_of(name)] for name in self.validation_names)

    @property
    def tokenizer_file(self) -> str:
        """Name of the datasets' tokenizer file, which tells what kind of tokenizer it is."""
        return next(iter(self.index.values())).tokenizer_file

    def opening(self, tokens: int) -> tuple[Tokenizer, np.ndarray]:
        """Return the datasets' tokenizer, and the first tokens of the longest document of validation (or training).

        Args:
            tokens: number of tokens, at most; EOS is not among them.
        """
        index = next(iter(self.validation.values()), None) or self.index["train"]
        longest = int(index.tokens_D.argmax())
        count = min(tokens, int(index.tokens_D[longest]) - 1)
        return load_tokenizer(index.root / index.tokenizer_file), _reader_of(index).read(longest, 0, count)

    def check_model(self, vocab_size: int, tokenizer_sha256: str | None = None) -> None:
        """Raise ValueError if a model of this vocabulary (and tokenizer, if given) cannot take these datasets."""
        wrong = []
        for name, index in self.index.items():
            if index.vocab_size > vocab_size:
                wrong.append(
                    f"model.vocab_size: found {vocab_size}, expected at least {index.vocab_size}, that of "
                    f"{name} dataset {index.root}"
                )
            if tokenizer_sha256 not in (None, index.tokenizer_sha256):
                wrong.append(
                    f"tokenizer: found sha256 {index.tokenizer_sha256[:12]} in {name} dataset {index.root}, "
                    f"expected the model's, {str(tokenizer_sha256)[:12]}"
                )
        if wrong:
            raise ValueError("\n".join(wrong))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return batches from `cursor` to max_steps. Raises ValueError if the cursor is of another run."""
        assert self.trainer is not None and self.given["train"] is not None
        index = self.index["train"]
        scheduler = LaneScheduler(
            index.tokens_D,
            lanes=self.lanes,
            window=self.window,
            seed=self.seed,
            fingerprint=index.fingerprint,
            datasets=index.queued if isinstance(index, Mixture) else None,
            cursor=self._cursor_in(index),
        )
        plans = LanePlans(
            scheduler,
            max_steps=self.trainer.max_steps,
            rank=self.trainer.global_rank // self.context_parallel,
            world_size=self.trainer.world_size // self.context_parallel,
            accumulate=self.trainer.accumulate_grad_batches,
            names=[name_of(part.path) for part in index.parts] if isinstance(index, Mixture) else None,
            ahead=STEPS_AHEAD if any(is_remote(part.path) for part in parts_of(self.given["train"])) else 0,
        )
        return self._loader(index, plans)

    def _cursor_in(self, index: DatasetIndex | Mixture) -> Cursor | None:
        """Return the cursor to continue from, adapted if the dataset has grown. Raises ValueError if it may not."""
        cursor = self.cursor
        if cursor is None or cursor.fingerprint == index.fingerprint or isinstance(index, Mixture):
            return cursor
        documents = index.earlier.get(cursor.fingerprint)
        if documents is None:  # this is another dataset, and the scheduler will refuse the cursor
            return cursor
        grown = f"{self.given['train']} has grown from {documents:,} to {index.documents:,} documents since then"
        if not self.allow_growth:
            raise ValueError(
                f"data.train: {grown}; --data.allow_growth true goes on with it: the epoch in progress ends with the "
                "documents that it began with, later ones have all"
            )
        rank_zero_warn(f"{grown}: the new ones come from the next epoch on")
        return replace(cursor, fingerprint=index.fingerprint, epoch_documents=cursor.epoch_documents or documents)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        loaders = [self._validation_loader(index) for index in self.validation.values()]
        return loaders[0] if len(loaders) == 1 else loaders

    def _validation_loader(self, index: DatasetIndex | Mixture) -> DataLoader[Batch]:
        assert self.trainer is not None
        plans = validation_plans(
            index.tokens_D,
            rows=self.micro_batch_size,
            rank=self.trainer.global_rank // self.context_parallel,
            world_size=self.trainer.world_size // self.context_parallel,
            segment_length=self.segment_length,
            parts=self.context_parallel,
            window=self.window,
            limit=self.limit_validation_tokens_per_document,
        )
        return self._loader(index, plans)

    def describe(self, documents: Iterable[int]) -> list[dict[str, Any]]:
        """Return what training documents are, given their numbers in batches.

        Returns:
            for each document: `dataset`, its directory or URL; `document`, its number there; `id`, None if it cannot
            be read.
        """
        index, found = self.index["train"], []
        everything = _reader_of(index)
        for number in documents:
            if isinstance(everything, MixtureReader):
                reader, own = everything.locate(number)
            else:
                reader, own = everything, number
            id = None
            with suppress(OSError, ValueError):
                id = reader.id_of(own)
            where = reader.index.remote.url if reader.index.remote else str(reader.index.root)
            found.append({"dataset": where, "document": own, "id": id})
        return found

    def _loader(self, index: DatasetIndex | Mixture, plans: LanePlans | list[BatchPlan]) -> DataLoader[Batch]:
        assert self.trainer is not None
        reader = _reader_of(index)
        return DataLoader(
            PlannedBatches(reader, self.trainer.global_rank % self.context_parallel, self.context_parallel),
            sampler=plans,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=preemption.shield,
            # The loader draws a base seed for its workers; by default that would change the global random state.
            generator=torch.Generator(),
        )
