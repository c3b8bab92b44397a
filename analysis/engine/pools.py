"""Where blocks are computed: in this process, in threads, in processes. One interface; more can plug in.

A pool may hand results over in any order: the engine merges them in a fixed one.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, TypeVar

R = TypeVar("R")
IN_FLIGHT = 2
_installed: Callable[[int], Any] | None = None


class Pool(Protocol):
    """Something that applies a picklable function to block numbers."""

    n_workers: int

    def map(self, function: Callable[[int], R], items: Iterable[int]) -> Iterator[tuple[int, R]]:
        """Yield (item, function(item)) as they finish, with at most IN_FLIGHT × n_workers begun and not yielded."""


class InProcess:
    """One after another, here."""

    n_workers = 1

    def map(self, function: Callable[[int], R], items: Iterable[int]) -> Iterator[tuple[int, R]]:
        """Yield in order."""
        for item in items:
            yield item, function(item)


class Threads:
    """Threads of this process: numpy and the reader release the interpreter lock for most of the work."""

    def __init__(self, n_workers: int) -> None:
        self.n_workers = n_workers

    def map(self, function: Callable[[int], R], items: Iterable[int]) -> Iterator[tuple[int, R]]:
        """Yield in the order of completion."""
        import torch

        whole = torch.get_num_threads()
        share = (_share_of_threads(self.n_workers),)
        try:
            with ThreadPoolExecutor(
                self.n_workers, initializer=torch.set_num_threads, initargs=share
            ) as executor:
                yield from _drive(executor, function, items, IN_FLIGHT * self.n_workers)
        finally:
            torch.set_num_threads(whole)


class Processes:
    """Fresh processes (spawned, so a script that uses them needs `if __name__ == "__main__"`)."""

    def __init__(self, n_workers: int) -> None:
        self.n_workers = n_workers

    def map(self, function: Callable[[int], R], items: Iterable[int]) -> Iterator[tuple[int, R]]:
        """Yield in the order of completion."""
        context = multiprocessing.get_context("spawn")
        given = (function, _share_of_threads(self.n_workers))
        with ProcessPoolExecutor(
            self.n_workers, context, initializer=_install, initargs=given
        ) as executor:
            yield from _drive(executor, _call, items, IN_FLIGHT * self.n_workers)


@contextmanager
def open_pool(workers: int = 1, ray: str | None = None) -> Iterator[Pool]:
    """Open the pool that `--workers` and `--ray` ask for, for one or more scans: `Scan(pool=pool)`.

    Without `ray`, this process or threads of it. `ray` is "local" for a Ray of our own, "auto" or an address for a
    cluster, which must see the runs under the same names. Results have the same bits on each.
    """
    if ray is None:
        yield make_pool(None, max(workers, 1))
        return
    from headwater.extractor.cluster.map import open_ray_map

    with open_ray_map(ray, max(workers, 1)) as pool:
        yield pool


def make_pool(kind: str | Pool | None, workers: int = 1) -> Pool:
    """Make a pool by name ("inprocess", "threads", "processes"); by default threads where there are several workers."""
    if workers < 1:
        raise ValueError(f"workers is {workers}; expected a whole number from 1 on.")
    if kind is None:
        kind = "inprocess" if workers == 1 else "threads"
    if not isinstance(kind, str):
        return kind
    pools: dict[str, Callable[[], Pool]] = {
        "inprocess": InProcess,
        "threads": lambda: Threads(workers),
        "processes": lambda: Processes(workers),
    }
    if kind not in pools:
        raise ValueError(f"there is no pool {kind!r}; expected one of {', '.join(pools)}.")
    return pools[kind]()


def _drive(
    executor: Executor, function: Callable[[int], R], items: Iterable[int], limit: int
) -> Iterator[tuple[int, R]]:
    """Keep `limit` calls begun; on an error or an early end, cancel what has not begun."""
    rest = iter(items)
    running: dict[Future[R], int] = {}
    try:
        while True:
            for item in islice(rest, limit - len(running)):
                running[executor.submit(function, item)] = item
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=running.__getitem__):
                yield running.pop(future), future.result()
    finally:
        for future in running:
            future.cancel()


def _share_of_threads(n_workers: int) -> int:
    """Return how many of torch's threads, which fight for the same cores, each of several workers may have."""
    import torch

    return max(torch.get_num_threads() // n_workers, 1)


def _install(function: Callable[[int], Any], n_threads: int) -> None:
    global _installed
    import torch

    torch.set_num_threads(n_threads)
    _installed = function


def _call(item: int) -> Any:
    assert _installed is not None
    return _installed(item)
