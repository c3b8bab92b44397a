"""Reused page-aligned slabs between the forward pass and the writer threads: bounded memory, no fresh pages."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from headwater.store.shard import CRC_BYTES, page_buffer, round_up


@dataclass
class Slab:
    """Room for `n` chunks of one array, each padded to whole pages so that it can go to disk as it lies."""

    pages: np.ndarray
    n: int
    chunk_bytes: int

    @staticmethod
    def make(n: int, chunk_bytes: int) -> Slab:
        # `page_buffer` adds room for a checksum itself, which the padding of the last row has already.
        padded = round_up(chunk_bytes + CRC_BYTES)
        return Slab(
            page_buffer(n * padded - CRC_BYTES)[: n * padded].reshape(n, padded), n, chunk_bytes
        )

    def chunks(self, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """View the slab as [n, *shape]; each chunk is contiguous, the padding lies between them."""
        # A strided view, no copy: chunks are `padded` bytes apart, and dense inside.
        flat = self.pages[:, : self.chunk_bytes].view(dtype)
        strides = np.zeros(shape, dtype).strides
        return np.lib.stride_tricks.as_strided(
            flat, (self.n, *shape), (self.pages.strides[0], *strides)
        )


class Ring:
    """A fixed number of slabs of one size; `take` waits for one to come back and counts the seconds it waited."""

    def __init__(self, depth: int, n: int, chunk_bytes: int) -> None:
        self.waited = 0.0
        self._free: queue.Queue[Slab] = queue.Queue()
        for _ in range(depth):
            self._free.put(Slab.make(n, chunk_bytes))

    def take(self, check: Callable[[], None]) -> Slab:
        """Return a free slab; `check` is called while waiting and may raise."""
        # Waiting here is the forward pass waiting for the disk; it is reported as the block's "wait".
        start = time.perf_counter()
        while True:
            try:
                slab = self._free.get(timeout=0.5)
                break
            except queue.Empty:
                check()
        self.waited += time.perf_counter() - start
        return slab

    def give(self, slab: Slab) -> None:
        """Return a slab for reuse."""
        self._free.put(slab)


class Lanes:
    """A few threads that each run their tasks in order; one key always goes to the same thread.

    The first error stops all further tasks and is raised by `check` and `join`.
    """

    def __init__(self, n_threads: int) -> None:
        self._queues: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(n_threads)]
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, args=(q,), daemon=True, name="headwater-write")
            for q in self._queues
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self, key: int, task: Callable[[], None], done: Callable[[], None] | None = None
    ) -> None:
        """Queue a task on the key's thread; `done` runs even where the task fails or is dropped."""
        self._queues[key % len(self._queues)].put((task, done))

    def check(self) -> None:
        """Raise the first error of a task."""
        if self._error is not None:
            raise self._error

    def join(self) -> None:
        """Wait until everything queued so far has run; raise the first error."""
        # A marker behind all that is queued on each thread; when all have come up, everything before them has run.
        markers: list[Future[None]] = [Future() for _ in self._queues]
        for q, marker in zip(self._queues, markers, strict=True):
            q.put((None, lambda marker=marker: marker.set_result(None)))
        for marker in markers:
            marker.result()
        self.check()

    def close(self) -> None:
        """End the threads after what is queued."""
        for q in self._queues:
            q.put(None)
        for thread in self._threads:
            thread.join()

    def reset(self) -> None:
        """Forget an error, so that another block can be tried."""
        self._error = None

    def _run(self, tasks: queue.SimpleQueue[Any]) -> None:
        while (item := tasks.get()) is not None:
            task, done = item
            try:
                if task is not None and self._error is None:
                    task()
            except BaseException as error:
                # The first error is the cause, the others its consequences. Later tasks are dropped and their slabs
                # given back all the same, or the forward pass would wait for one for ever.
                self._error = self._error or error
            finally:
                if done is not None:
                    done()
