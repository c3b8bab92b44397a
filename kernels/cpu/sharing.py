"""Threads of Python among which calls that release the interpreter's lock are shared."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")


def share(function: Callable[[T], object], items: Sequence[T], at_most: int = 1 << 30) -> None:
    """Call a function on every item, in parallel on torch's number of threads or fewer, this one among them.

    Who is free takes the next item, so a thread that is late holds up nobody but itself.
    """
    n_threads = torch.get_num_threads()
    left = iter(items)

    def work() -> None:
        for item in left:
            function(item)

    n_others = min(n_threads, len(items), at_most) - 1
    others = [_threads(n_threads, os.getpid()).submit(work) for _ in range(n_others)]
    work()
    for other in others:
        other.result()


def even_slices(n: int, at_most: int = 1 << 30) -> list[slice]:
    """Cut range(n) into a slice for each of torch's threads, or into `at_most`, none of them empty."""
    n_parts = min(torch.get_num_threads(), n, at_most)
    return [slice(n * i // n_parts, n * (i + 1) // n_parts) for i in range(n_parts)]


@lru_cache(maxsize=2)
def _threads(n: int, process: int) -> ThreadPoolExecutor:
    """Return a pool of n threads; one per process, for a fork has the object but not its threads."""
    return ThreadPoolExecutor(n, thread_name_prefix=f"headwater-{process}")
