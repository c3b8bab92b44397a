"""Folders for the time of a process: deleted when it is done, or, where it was killed, by the next one."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = b"headwater scratch folder\n"
LOCK_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def scratch_folder(prefix: str, base: Path | None = None) -> Iterator[Path]:
    """Make a folder, under a lock that dies with us; delete it afterwards, and first those of dead processes.

    `base` is the temporary directory (TMPDIR) by default.
    """
    base = base or Path(tempfile.gettempdir())
    for folder in _left_over(prefix, base):
        with suppress(OSError), open(os.open(folder / "lock", LOCK_FLAGS), "rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if handle.read() == MARK:
                _delete(folder)
    # The lock is taken on a file of another name and renamed: once there is a `lock`, it is held, and nobody can
    # take a folder for left over between the two.
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
    with open(folder / "new", "wb") as handle:
        handle.write(MARK)
        handle.flush()
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.replace(folder / "new", folder / "lock")
        try:
            yield folder
        finally:
            _delete(folder)


def _left_over(prefix: str, base: Path) -> list[Path]:
    """List folders that bear our name and belong to us; a link may lead anywhere, and is left alone."""
    with os.scandir(base) as items:
        return [
            Path(item.path)
            for item in items
            if item.name.startswith(prefix)
            and item.is_dir(follow_symlinks=False)
            and item.stat(follow_symlinks=False).st_uid == os.geteuid()
        ]


def _delete(folder: Path) -> None:
    """Delete a folder, the lock last: processes that are just ending may still write, then the next run deletes it."""
    for _ in range(50):
        items = [item for item in folder.iterdir() if item.name != "lock"]
        if not items:
            shutil.rmtree(folder, ignore_errors=True)
            return
        for item in items:
            shutil.rmtree(item, ignore_errors=True)
            with suppress(OSError):
                item.unlink()
        time.sleep(0.05)
