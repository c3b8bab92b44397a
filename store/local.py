"""Runs on a file system: `pathlib.Path`, with what a run needs beyond it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PosixPath
from typing import Any, BinaryIO, TypeVar

from headwater.store.files import (
    FileState,
    create_durably,
    sync_directory,
    unique_name,
    write_durably,
)
from headwater.store.writer import INTERNAL

QUIET_SECONDS = 3.0
A = TypeVar("A")
B = TypeVar("B")


class LocalPath(PosixPath):
    """A file or folder of a run on a file system; see `headwater.store.place.Place`."""

    folder_kind = "directory"
    remote = None

    @property
    def local(self) -> Path:
        """The path itself."""
        return self

    def size(self) -> int:
        """Return the file's bytes."""
        return self.stat().st_size

    def state(self) -> FileState:
        """Return the file's state; its mark tells a file from another that took its name."""
        stat = self.stat()
        return FileState(stat.st_size, stat.st_mtime, f"{stat.st_ino} {stat.st_mtime_ns}")

    def read_range(self, first: int, n_bytes: int) -> bytes:
        """Return a part of the file."""
        with self.open("rb") as file:
            file.seek(first)
            return file.read(n_bytes)

    def read_all(self, names: Iterable[str]) -> Iterator[bytes | OSError]:
        """Yield the bytes of files of this folder in order, or the error in their place."""
        for name in names:
            try:
                yield (self / name).read_bytes()
            except OSError as error:
                yield error

    def write_whole(self, name: str, data: bytes) -> None:
        """Write a file of this run whole or not at all, and durably."""
        write_durably(self / name, data, self._temporary(name))

    def create_whole(self, name: str, data: bytes) -> bool:
        """Write a file of this run durably unless it exists; return whether this call made it."""
        return create_durably(self / name, data, self._temporary(name))

    @contextmanager
    def writing(self) -> Iterator[BinaryIO]:
        """Open a neighbour for writing that takes this name at the end."""
        self.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.with_name(unique_name(self.stem))
        with temporary.open("wb") as file:
            yield file
        temporary.replace(self)

    def delete_all(self, names: Iterable[str]) -> None:
        """Delete files of this folder durably."""
        for name in names:
            (self / name).unlink(missing_ok=True)
        if self.is_dir():
            sync_directory(self)

    def delete_tree(self) -> None:
        """Delete the folder and all that is in it."""
        shutil.rmtree(self)

    def clear_temporary(self) -> None:
        """Delete what dead attempts left."""
        for item in os.scandir(self / INTERNAL / "tmp"):
            if item.is_file():
                os.unlink(item.path)

    def quiet_mark(self) -> str | None:
        """Return the folder's inode and time; None where it may change again within the same tick of its clock.

        A network file system asks its server again at each open, not at each stat.
        """
        try:
            handle = os.open(self, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return ""
        try:
            stat = os.fstat(handle)
        finally:
            os.close(handle)
        if time.time() - stat.st_mtime <= QUIET_SECONDS:
            return None
        return f"{stat.st_ino} {stat.st_mtime_ns}"

    def file_names(self) -> Iterator[str]:
        """Yield the names of the files directly in the folder: what is a folder or a link is nobody's entry."""
        if not self.is_dir():
            return
        with os.scandir(self) as items:
            for item in items:
                if item.is_file(follow_symlinks=False):
                    yield item.name

    def names_below(self) -> Iterator[str]:
        """Yield the names of all files in the folder, at any depth."""
        for item in self.rglob("*"):
            if item.is_file():
                yield str(item.relative_to(self))

    def folders(self) -> list[str]:
        """List the folders directly in this one, sorted; links and hidden ones are left out."""
        names = list[str]()
        with suppress(OSError), os.scandir(self) as items:
            names = [item.name for item in items if item.is_dir(follow_symlinks=False)]
        return sorted(name for name in names if not name.startswith("."))

    def each(self, call: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """Call a function for each item, one after another."""
        return list(map(call, items))

    def contains(self, other: object) -> bool:
        """Say whether a path lies under this one when all links are followed."""
        try:
            return Path(str(other)).resolve().is_relative_to(self)
        except (OSError, RuntimeError):
            return False

    def above(self) -> Iterator[LocalPath]:
        """Yield the folders that this one lies in, from the nearest on."""
        yield from LocalPath(os.path.realpath(self)).parents

    def free_bytes(self) -> int:
        """Return the free bytes of the file system: that of the nearest folder that is there."""
        place = self.absolute()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    def for_zarr(self, read_only: bool = True) -> Any:
        """Return the path: zarr and xarray take it as it is."""
        return self

    def _temporary(self, name: str) -> Path:
        return self / INTERNAL / "tmp" / unique_name(name.rpartition("/")[2])
