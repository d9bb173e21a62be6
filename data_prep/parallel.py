"""Maps a function over items in several processes, with ordered results and a bounded number of items in flight."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """Compute `map(function, items)` in `workers` processes.

    Args:
        function: called in a worker for each item.
        items: read only a few items ahead of the results.
        workers: number of processes.
        initializer: called once in each worker.
        initargs: arguments of `initializer`.

    Returns:
        The results in the order of the items.

    Raises:
        ValueError: `workers` is not positive.
        RuntimeError: a worker dies, for instance because memory runs out.
    """
    if workers < 1:
        raise ValueError(f"workers: found {workers}, expected at least 1")
    # Forked workers start fastest. It is safe here because workers use neither torch nor threads.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _initialise_worker, (initializer, initargs))
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process was killed, most likely because memory ran out: use fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _initialise_worker(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent stops the workers
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    if initializer:
        initializer(*initargs)


def _leave_with_parent() -> None:
    """Exit when the parent is killed; otherwise the worker would wait for work, and hold its locks, for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only workers call this"
    parent.join()
    os._exit(1)


def progress_bar() -> Progress:
    """Return a progress bar in the common style of data_prep; tasks need the field `note`."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
