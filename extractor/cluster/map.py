"""Apply a function to numbers on Ray actors: the pool of analyses, with the connection and the seats of extraction."""

from __future__ import annotations

import os
import pickle
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from headwater.extractor.cluster.in_flight import IN_FLIGHT, Seats
from headwater.extractor.cluster.ray import Cluster, WorkersLost, connection

R = TypeVar("R")
MAX_FAILURES = 3


class MapActor:
    """One process that holds a function and applies it; Ray makes it an actor."""

    def __init__(self, function: Callable[[int], Any]) -> None:
        self._function = function

    def ready(self) -> str:
        """Say where this worker is."""
        return f"{socket.gethostname()}:{os.getpid()}"

    def work(self, item: int) -> bytes:
        """Apply the function; return the pickled result, since arrays that Ray itself carries can only be read."""
        return pickle.dumps(self._function(item), pickle.HIGHEST_PROTOCOL)

    def close(self) -> None:
        """Do nothing: there are no temporary files."""


class RayMap:
    """A pool of `n_workers` actors on a cluster: `map` yields results as they come."""

    def __init__(self, cluster: Cluster, n_workers: int, threads: int) -> None:
        self.n_workers = n_workers
        self._cluster = cluster
        self._threads = threads

    def map(self, function: Callable[[int], R], items: Iterable[int]) -> Iterator[tuple[int, R]]:
        """Yield (item, function(item)) as they finish, with at most IN_FLIGHT × n_workers begun and not yielded.

        What the function raises is raised here. An item whose worker dies is tried again; WorkersLost is raised when
        that happens three times. The function travels once a worker: to Ray's store, then to each actor.
        """
        shared = self._cluster.ray.put(function)
        seats = Seats(
            self._cluster,
            self.n_workers,
            lambda: self._cluster.hire(MapActor, self._threads, 0, shared),
        )
        rest = iter(items)
        waiting = deque[int]()
        failures = Counter[int]()
        try:
            seats.fill()
            while True:
                waiting.extend(islice(rest, max(IN_FLIGHT * self.n_workers - len(waiting), 0)))
                if not waiting and not seats.busy:
                    return
                seats.welcome()
                seats.hand_out(waiting, lambda actor, item: actor.work.remote(item))
                for outcome in seats.collect():
                    if outcome.cause is not None:
                        raise outcome.cause
                    if outcome.value is not None:
                        yield outcome.items[0], pickle.loads(outcome.value)
                        continue
                    failures.update(outcome.items[:1])
                    if any(n == MAX_FAILURES for n in failures.values()):
                        raise WorkersLost(
                            f"block {outcome.items[0]} lost three workers: {outcome.lost}"
                        )
                    waiting.extendleft(reversed(outcome.items))
        finally:
            seats.dismiss_all(always=True)


@contextmanager
def open_ray_map(address: str | None, workers: int) -> Iterator[RayMap]:
    """Start a Ray of our own (address None or "local"), or join one, for several maps; what was begun is ended."""
    with connection(None if address == "local" else address, workers) as cluster:
        yield RayMap(cluster, workers, cluster.fair_threads(workers))
