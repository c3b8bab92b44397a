"""One run, one driver: an advisory lock on the run that names its holder and dies with it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from headwater.store.files import make_directories, sync_directory
from headwater.store.lease import LockedError as LockedError
from headwater.store.lease import lease
from headwater.store.manifest import PROBE, RunError
from headwater.store.place import PlaceLike, place_of
from headwater.store.writer import INTERNAL


@contextmanager
def hold(run: PlaceLike) -> Iterator[Callable[[], None]]:
    """Hold the run's lock; raise LockedError with the first holder's name where it is taken.

    Yield a function that raises LockedError once the lock is lost, which can only happen in an object store.
    """
    run = place_of(run)
    if run.remote is not None:
        with lease(run.remote) as check:
            yield check
        return
    assert run.local is not None
    path = run.local / INTERNAL / "lock"
    # The lock is the kernel's (flock) and dies with its holder; the file only says who that is.
    make_directories(path.parent)
    refuse_links(run.local)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(
                f"{run} is being written by {_holder(path)}. One run has one writer: wait for it, or "
                "stop it and run this command again."
            ) from None
        me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now().isoformat(timespec="seconds"),
        }
        # Written in place: a rename would give the lock's name to another file, which is not locked.
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(me).encode(), 0)
        yield lambda: None
    finally:
        os.close(handle)


def refuse_links(run: Path) -> None:
    """Refuse to write where a link in a run's bookkeeping leads elsewhere: what lies there is changed and deleted."""
    for item in (run / INTERNAL, *(run / INTERNAL).iterdir()):
        if item.is_symlink():
            raise RunError(
                f"{item} is a link, and Headwater changes and deletes what lies there. Put the folder or file itself "
                "in its place, or name another --out."
            )


def _holder(path: Path) -> str:
    try:
        raw = json.loads(path.read_bytes())
        return f"process {raw['pid']} on {raw['host']} since {raw['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def probe(run: PlaceLike) -> None:
    """Try on the target what the run's promise rests on: rename, directory fsync, hard links; of an object, a write.

    Raises OSError with the operation's name where one is refused.
    """
    run = place_of(run)
    if run.local is None:
        item = run / INTERNAL / "tmp" / f"{PROBE}{socket.gethostname()}-{os.getpid()}"
        item.write_bytes(b"headwater")
        item.unlink()
        return
    folder = run.local / INTERNAL / "tmp"
    make_directories(folder)
    first, second, third = (folder / f"{PROBE}{os.getpid()}-{i}" for i in range(3))
    # Exactly what commits a block: create, rename, fsync of a directory, and a hard link for ledger entries.
    operation = "create a file"
    try:
        third.unlink(
            missing_ok=True
        )  # a process that died here may have had the same number, as in containers
        first.write_bytes(b"headwater")
        operation = "rename a file"
        os.replace(first, second)
        operation = "fsync a directory"
        sync_directory(folder)
        operation = "make a hard link"
        os.link(second, third)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{run} cannot hold a run: the file system refuses to {operation} "
            f"({error.strerror}). Choose another directory for --out",
        ) from error
    finally:
        for path in (first, second, third):
            path.unlink(missing_ok=True)
