"""What connections may hold: how many there are, how long they may stay idle, how many bytes wait for their readers."""

from __future__ import annotations

import asyncio
import resource
import threading
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from headwater.service.settings import Limits

RESERVED_FILES = 200  # the queue, workers' pipes, listings, libraries
FILES_PER_CONNECTION = 2  # its socket, and a file of a run that is being sent
SPARE = 64


class BusyError(RuntimeError):
    """The server has no hand or no memory free for a request."""


class Budget:
    """An amount that requests take parts of while they need them, such as bytes in memory."""

    def __init__(self, total: int, why: str) -> None:
        self._left = total
        self._why = why
        self._lock = threading.Lock()

    def take(self, n: int) -> None:
        """Take a part; raise BusyError where that is not left."""
        with self._lock:
            if n > self._left:
                raise BusyError(f"{self._why} Ask again in a moment.")
            self._left -= n

    def give_back(self, n: int) -> None:
        """Give a part back."""
        with self._lock:
            self._left += n

    @contextmanager
    def hold(self, n: int) -> Iterator[None]:
        """Take a part for a while."""
        self.take(n)
        try:
            yield
        finally:
            self.give_back(n)


class Patience:
    """How long the other side of a connection may let us wait: some seconds, and more for what it has moved."""

    def __init__(self, limits: Limits) -> None:
        self._left = limits.stall_seconds
        self._rate = limits.slowest

    async def wait(self, step: Awaitable[Any], n_bytes: int = 0) -> Any:
        """Await a step that moves bytes; raise TimeoutError once all waiting was longer than the bytes are worth."""
        # What is left shrinks by the time waited and grows by the bytes moved: a slow line may take for ever as long as
        # it keeps above the rate, and one that stops is ended after the seconds it has saved.
        begun = time.monotonic()
        try:
            async with asyncio.timeout(max(self._left, 0.001)):
                return await step
        finally:
            self._left += n_bytes / self._rate - (time.monotonic() - begun)

    def earn(self, n_bytes: int) -> None:
        """Count bytes whose number is known only once they are here."""
        self._left += n_bytes / self._rate


class Connections:
    """The open connections of a server. Where there are too many, the one that was idle longest is ended."""

    def __init__(self, limits: Limits) -> None:
        self._header_seconds = limits.header_seconds
        self.most = most_connections(limits.connections)
        self.open: set[Any] = set()

    def protocol(self) -> type[H11Protocol]:
        """Return the class that uvicorn makes of each connection."""
        watch = self

        class Watched(H11Protocol):
            """A connection that notes since when nothing has been asked of it."""

            def connection_made(self, transport: Any) -> None:
                self.idle_since = time.monotonic()
                super().connection_made(transport)
                watch.make_room(self)

            def on_response_complete(self) -> None:
                self.idle_since = time.monotonic()
                super().on_response_complete()

        return Watched

    def make_room(self, newest: Any) -> None:
        """End the connection that was idle longest where there are too many; the newest where all are at work."""
        if len(self.open) <= self.most:
            return
        # Those that are closing are as good as gone.
        here = [c for c in self.open if not c.transport.is_closing()]
        idle = [c for c in here if c is not newest and _is_idle(c)]
        if len(here) > self.most and idle:
            min(idle, key=lambda c: float(c.idle_since)).transport.abort()
        # All are at work: a few more are let in, since they may end at any moment.
        elif len(here) > self.most + SPARE:
            newest.transport.abort()

    def sweep(self) -> None:
        """End connections whose next request has not come, or not whole, for too long."""
        before = time.monotonic() - self._header_seconds
        for connection in list(self.open):
            if _is_idle(connection) and connection.idle_since < before:
                connection.transport.abort()

    def abort(self, client: object) -> None:
        """End the connection of a client at once, with what waits for it."""
        for connection in list(self.open):
            if client is not None and connection.client == client:
                connection.transport.abort()


def most_connections(wanted: int) -> int:
    """Raise this process's limit on open files as far as needed; return how many connections fit below it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = RESERVED_FILES + FILES_PER_CONNECTION * (wanted + SPARE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed
        if hard != resource.RLIM_INFINITY:
            soft = min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return wanted
    # The inverse of `needed`, where the hard limit lies below it.
    return max(min(wanted, (soft - RESERVED_FILES) // FILES_PER_CONNECTION - SPARE), 1)


def _is_idle(connection: Any) -> bool:
    return connection.cycle is None or bool(connection.cycle.response_complete)
