"""Seats of a pool of Ray actors: who sits there, what each has in flight, and what comes of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from headwater.extractor.cluster.ray import Cluster, WorkersLost, cause_of_death

IN_FLIGHT = 2
MAX_REFUSALS = 2
START_SECONDS = 300
CLOSE_SECONDS = 10
TICK_SECONDS = 1.0


@dataclass
class Seat:
    """One actor and what it has in flight, oldest first; `since` it starts, or is at the oldest."""

    actor: Any
    starting: Any | None
    since: float
    name: str = ""
    flying: deque[tuple[Any, int]] = field(default_factory=deque)

    def take(self, reference: Any) -> int:
        """Take an item out of what is in flight."""
        item = next(i for r, i in self.flying if r == reference)
        self.flying.remove((reference, item))
        self.since = time.monotonic()
        return item


@dataclass(frozen=True)
class Outcome:
    """What came of a worker's items: a value; an error of the one item (`cause`); or, `lost`, its death with them."""

    items: tuple[int, ...]
    worker: str
    value: Any = None
    cause: BaseException | None = None
    lost: str = ""


class Seats:
    """`n` actors, each with its next item waiting. An actor has `ready()`, its name, `work(item, …)` and `close()`.

    `hire` starts an actor. One that dies is replaced, and so is one that cannot start, a few times.
    """

    def __init__(self, cluster: Cluster, n: int, hire: Callable[[], Any]) -> None:
        self._cluster = cluster
        self._n = n
        self._hire = hire
        self._seats: list[Seat] = []
        self._end = ""
        self.refusal = ""
        self.n_lost = self.n_refused = 0

    def fill(self) -> None:
        """Start all actors."""
        for _ in range(self._n):
            self._add()

    @property
    def busy(self) -> bool:
        """Whether anything is in flight."""
        return any(seat.flying for seat in self._seats)

    @property
    def working(self) -> list[Seat]:
        """The seats whose actors have started."""
        return [seat for seat in self._seats if seat.starting is None]

    @property
    def n_starting(self) -> int:
        return len(self._seats) - len(self.working)

    def hand_out(self, waiting: deque[int], begin: Callable[[Any, int], Any]) -> None:
        """Give waiting items to whoever has fewest; `begin` calls an actor's method and returns Ray's reference."""
        for depth in range(IN_FLIGHT):
            for seat in self.working:
                if waiting and len(seat.flying) == depth:
                    item = waiting.popleft()
                    if not seat.flying:
                        seat.since = time.monotonic()
                    seat.flying.append((begin(seat.actor, item), item))

    def collect(self) -> Iterator[Outcome]:
        """Wait a moment, and yield what came."""
        ray = self._cluster.ray
        references = [reference for seat in self._seats for reference, _ in seat.flying]
        references += [seat.starting for seat in self._seats if seat.starting is not None]
        done, _ = ray.wait(references, timeout=TICK_SECONDS)
        for reference in done:
            seat = next((s for s in self._seats if any(r == reference for r, _ in s.flying)), None)
            if seat is None:
                continue
            try:
                value = ray.get(reference)
            except ray.exceptions.RayActorError as error:
                yield self._replace(seat, cause_of_death(error))
            except ray.exceptions.RayTaskError as error:
                yield Outcome((seat.take(reference),), seat.name, cause=error.cause or error)
            except ray.exceptions.RayError as error:
                yield Outcome((seat.take(reference),), seat.name, lost=cause_of_death(error))
            else:
                yield Outcome((seat.take(reference),), seat.name, value)

    def welcome(self) -> None:
        """Let actors that have started take items; try others for those that cannot.

        Raises WorkersLost where none is left to go on, or none starts for minutes.
        """
        ray = self._cluster.ray
        for seat in [seat for seat in self._seats if seat.starting is not None]:
            if not ray.wait([seat.starting], timeout=0)[0]:
                continue
            try:
                seat.name, seat.starting, seat.since = (
                    ray.get(seat.starting),
                    None,
                    time.monotonic(),
                )
            except ray.exceptions.RayError as error:
                self._seats.remove(seat)
                self._dismiss(seat)
                self.n_refused += 1
                self.refusal = cause_of_death(error)
                self._end = f"no worker could start: {self.refusal}"
                if self.n_refused <= MAX_REFUSALS * self._n:  # its node may have been the fault
                    self._add()
        if not self._seats:
            raise WorkersLost(self._end)
        if all(
            s.starting is not None and time.monotonic() - s.since > START_SECONDS
            for s in self._seats
        ):
            raise WorkersLost(
                f"no worker started within {START_SECONDS} s: the cluster has no room for the CPUs that a worker "
                "takes. Ask for fewer with --threads, or run the same command again when there is room."
            )

    def retire(self, name: str, why: str) -> tuple[int, ...]:
        """End a worker whose node is at fault, without hiring another; return what it had in flight."""
        seat = next(seat for seat in self.working if seat.name == name)
        self._seats.remove(seat)
        self._dismiss(seat)
        self.n_lost += 1
        self._end = f"no worker is left: {why}"
        return tuple(item for _, item in seat.flying)

    def close(self) -> None:
        """Let actors that have nothing to do delete their temporary files."""
        ray = self._cluster.ray
        closing = [seat.actor.close.remote() for seat in self.working]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_SECONDS)

    def dismiss_all(self, always: bool = False) -> None:
        """End the actors; unless `always`, not where Ray ends with us and all of them with it."""
        for seat in self._seats if always or not self._cluster.local else ():
            self._dismiss(seat)

    def running(self) -> Sequence[tuple[str, int, float]]:
        """Return (worker, item, seconds since it began) of what is at work."""
        now = time.monotonic()
        return [
            (seat.name, seat.flying[0][1], now - seat.since) for seat in self.working if seat.flying
        ]

    def _add(self) -> None:
        actor = self._hire()
        self._seats.append(Seat(actor, actor.ready.remote(), time.monotonic()))

    def _replace(self, seat: Seat, why: str) -> Outcome:
        """Hire another actor for one that died with what it had in flight."""
        self._seats.remove(seat)
        self._dismiss(seat)
        self.n_lost += 1
        self._add()
        return Outcome(tuple(item for _, item in seat.flying), seat.name, lost=why)

    def _dismiss(self, seat: Seat) -> None:
        with suppress(Exception):  # it is dead already, or Ray is
            self._cluster.ray.kill(seat.actor)
