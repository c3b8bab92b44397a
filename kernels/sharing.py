"""Threads of Python among which calls that release the interpreter's lock are shared."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch


def share(function: Callable[[slice], None], n: int) -> None:
    """Call a function on slices of range(n), in parallel on torch's number of threads, this one among them."""
    n_threads = min(torch.get_num_threads(), n)
    slices = [slice(n * i // n_threads, n * (i + 1) // n_threads) for i in range(n_threads)]
    others = [_threads(torch.get_num_threads(), os.getpid()).submit(function, part) for part in slices[1:]]
    function(slices[0])
    for other in others:
        other.result()


@lru_cache(maxsize=2)
def _threads(n: int, process: int) -> ThreadPoolExecutor:
    """Return a pool of n threads; one per process, for a fork has the object but not its threads."""
    return ThreadPoolExecutor(n, thread_name_prefix=f"headwater-{process}")
