"""The lock of a run in an object store: an object that its holder writes again and again.

Nobody's clock is compared. Who finds a lock watches it: one that changes is held, and its holder is named; one that
does not change for LEASE_SECONDS belongs to a dead process and is taken over. The lock saves work and keeps progress
readable; were it broken, two drivers would write equal bytes.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

from headwater.store.objects import ObjectPath, StoreError
from headwater.store.writer import INTERNAL

REFRESH_SECONDS = 10.0
LEASE_SECONDS = 60.0
POLL_SECONDS = 1.0


class LockedError(RuntimeError):
    """Another process is writing to the run; the message names it."""


@contextmanager
def lease(run: ObjectPath) -> Iterator[Callable[[], None]]:
    """Hold the run's lock; raise LockedError with the holder's name where it is taken.

    Yield a function that raises LockedError once somebody else has taken it over.
    """
    held = _Lease(run)
    held.take()
    thread = threading.Thread(target=held.refresh, daemon=True, name="headwater-lease")
    thread.start()
    try:
        yield held.check
    finally:
        held.end.set()
        thread.join()
        with suppress(OSError):
            held.release()


class _Lease:
    def __init__(self, run: ObjectPath) -> None:
        self._run = run
        self._path = run / INTERNAL / "lock"
        self._me: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "key": uuid.uuid4().hex,
            "beat": 0,
            "since": datetime.now().isoformat(timespec="seconds"),
        }
        self._tag = ""
        self._renewed = time.monotonic()
        self._lost: LockedError | None = None
        self.end = threading.Event()

    def take(self) -> None:
        """Create the lock, or take over that of a dead process."""
        # Conditional PUT (If-None-Match: *): of several that ask, one makes the object.
        if self._path.create(self._data()):
            self._tag = self._path.read_with_tag()[1]
            self._renewed = time.monotonic()
            return
        # Only changes are watched: a holder writes every REFRESH_SECONDS, so six of them fit into the wait.
        before, tag = self._read()
        end = time.monotonic() + (0 if _is_dead(before) else LEASE_SECONDS)
        while tag:
            if time.monotonic() >= end:
                # Where it is another's, or two requests met (409), look again.
                with suppress(FileExistsError, FileNotFoundError):
                    self._tag = self._replace(tag)
                    self._renewed = time.monotonic()
                    return
            time.sleep(POLL_SECONDS)
            now, tag = self._read()
            if tag and now != before:
                raise self._locked(now)
        self.take()  # it was released meanwhile

    def refresh(self) -> None:
        """Write the lock again and again, until `end` is set or it is lost."""
        while not self.end.wait(REFRESH_SECONDS):
            with suppress(StoreError):  # the next time will do
                try:
                    # Each write differs from the last one, so that a watcher sees the object change.
                    self._me["beat"] += 1
                    self._tag = self._replace(self._tag)
                except (FileExistsError, FileNotFoundError):
                    now, tag = self._read()
                    if _key(now) != self._me["key"]:
                        self._lost = self._locked(now)
                        return
                    self._tag = tag  # it was our own request, whose answer was lost
                self._renewed = time.monotonic()

    def check(self) -> None:
        """Raise LockedError where the lock is lost.

        After a pause, as of a process that was stopped, it is read first: `refresh` may not have come to it yet.
        """
        # Half of the lease: before anybody could have taken it over, had the refresh thread run meanwhile.
        if time.monotonic() - self._renewed > LEASE_SECONDS / 2:
            with suppress(StoreError):
                now = self._read()[0]
                if _key(now) != self._me["key"]:
                    self._lost = self._locked(now)
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
        """Delete the lock if it is still ours."""
        if _key(self._read()[0]) == self._me["key"]:
            self._path.unlink()

    def _replace(self, tag: str) -> str:
        try:
            return self._path.replace_version(self._data(), tag)
        except NotImplementedError:
            now, _ = self._read()
            if self._tag and _key(now) != self._me["key"]:
                raise FileExistsError from None
            self._path.write_bytes(self._data())
            return self._read()[1]

    def _read(self) -> tuple[bytes, str]:
        try:
            return self._path.read_with_tag()
        except FileNotFoundError:
            return b"", ""

    def _data(self) -> bytes:
        return json.dumps(self._me).encode()

    def _locked(self, data: bytes) -> LockedError:
        raw = _parse(data)
        who = ""
        if {"pid", "host", "since"} <= raw.keys():
            who = "process {pid} on {host} since {since}".format(**raw)
        return LockedError(
            f"{self._run} is being written by {who or 'another process'}. One run has one writer: wait for it, or stop "
            "it and run this command again."
        )


def _is_dead(data: bytes) -> bool:
    """Whether the holder was a process of this machine that is gone."""
    raw = _parse(data)
    if raw.get("host") != socket.gethostname() or not isinstance(raw.get("pid"), int):
        return False
    try:
        os.kill(raw["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _key(data: bytes) -> str:
    return str(_parse(data).get("key", ""))


def _parse(data: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(data)
    except ValueError:
        return {}
    if isinstance(raw, dict):
        return raw
    return {}
