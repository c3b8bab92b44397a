"""Durable file operations: what has been committed survives a crash, and nothing half-written carries a final name."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c

GONE = "it was moved or deleted while the run was written. Put it back, and run the command again to go on."


class FileState(NamedTuple):
    """A file's bytes, the time of its last change in seconds, and a mark that differs for what is written anew."""

    n_bytes: int
    modified: float
    mark: str


class RunMoved(RuntimeError):
    """A run's folder went away while it was written; the message says what to do."""


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    # A file's fsync makes its bytes durable, not its name: that is an entry of the directory, which has to be
    # fsynced itself after every create, rename and link that must survive.
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directories(path: Path) -> list[Path]:
    """Create a directory with its ancestors; return the existing directories that got a new entry, to be synced."""
    # A new directory is durable only once its parent was fsynced, so the parents go back to the caller, who
    # syncs them after the file inside was made.
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
    return [directory.parent for directory in missing]


def unique_name(stem: str) -> str:
    """Return a temporary file's name that no other writer has, on whatever machine it runs.

    A process id is not enough: containers and machines that share a run have the same ones, and a file that is taken
    for one's own could be renamed into place half-written.
    """
    return f"{stem}.{os.getpid()}-{uuid.uuid4().hex}"


def write_temporary(path: Path, data: bytes) -> None:
    """Write and fsync a new file; raise FileExistsError where there is one of its name."""
    _write(path, data, os.O_EXCL)


def write_synced(path: Path, data: bytes) -> None:
    """Write and fsync a file, in place of what it held."""
    _write(path, data, os.O_TRUNC)


def _write(path: Path, data: bytes, mode: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | mode | os.O_CLOEXEC, 0o644)
    try:
        # One write may take less than all (a signal, a full disk): go on until nothing is left.
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, data: bytes, temporary: Path) -> None:
    """Write a file whole or not at all: temporary file, fsync, rename, fsync of the directories."""
    # 1. The bytes go to a temporary file and are fsynced: were they renamed first, a power loss could leave the
    # final name on an empty file.
    # 2. The rename is atomic: a reader sees the old file or the new one, whole.
    # 3. The directories are fsynced last: from here on the name survives as well.
    parents = make_directories(path.parent)
    make_directories(temporary.parent)
    write_temporary(temporary, data)
    os.replace(temporary, path)
    for directory in {path.parent, *parents}:
        sync_directory(directory)


def create_durably(path: Path, data: bytes, temporary: Path) -> bool:
    """Write a file unless it exists; return whether this call made it."""
    # As `write_durably`, but a link instead of a rename: it fails where the name exists, so that of two
    # processes exactly one makes the file, and neither replaces the other's.
    parents = make_directories(path.parent)
    make_directories(temporary.parent)
    write_temporary(temporary, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    for directory in {path.parent, *parents}:
        sync_directory(directory)
    return True


def json_sum(value: Any) -> str:
    """Return the CRC32C of JSON values, whatever their layout: of the text with sorted keys and no spaces, as hex."""
    # Of the canonical text: a checksum of the file's bytes would change with its indentation.
    data = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    return int(google_crc32c.value(data)).to_bytes(4, "little").hex()


def to_json(value: Any) -> bytes:
    """Serialise JSON the same way every time: sorted keys, two spaces, a final line end."""
    return (
        json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    ).encode()
