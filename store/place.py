"""Where a run lies: a directory or a prefix in an object store, asked the same way by those who use it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeAlias, TypeVar
from urllib.parse import unquote

from headwater.store.files import FileState
from headwater.store.local import LocalPath
from headwater.store.objects import SCHEMES, ObjectPath, is_url

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)(.*)", re.DOTALL)
A = TypeVar("A")
B = TypeVar("B")
PlaceLike: TypeAlias = "str | os.PathLike[str] | Place"


class Place(Protocol):
    """A run, or a file or folder of it: a LocalPath or an ObjectPath.

    What both can do is asked of the place itself. What only a file system can (memory maps, renames, links) is done on
    `local`, what only an object store can (conditional writes) on `remote`; of the two exactly one is not None.
    """

    @property
    def local(self) -> Path | None:
        """The path on this machine, None in an object store."""

    @property
    def remote(self) -> ObjectPath | None:
        """The prefix in an object store, None on a file system."""

    @property
    def folder_kind(self) -> str:
        """What a folder is called here: directory or prefix."""

    @property
    def name(self) -> str:
        """The last part."""

    def __truediv__(self, name: str, /) -> Place:
        """Return a place inside this one."""

    def with_name(self, name: str, /) -> Place:
        """Return a neighbour."""

    def absolute(self) -> Place:
        """Return the place as it is named everywhere."""

    def resolve(self) -> Place:
        """Return the place with its links followed."""

    def exists(self) -> bool:
        """Whether there is anything here."""

    def is_file(self) -> bool:
        """Whether there is a file of this name."""

    def is_dir(self) -> bool:
        """Whether there is a folder here, or are objects under this prefix."""

    def size(self) -> int:
        """Return a file's bytes; raise FileNotFoundError without it."""

    def state(self) -> FileState:
        """Return a file's state; raise FileNotFoundError without it."""

    def open(self, mode: Literal["rb"], /) -> BinaryIO:
        """Open a file for reading."""

    def read_bytes(self) -> bytes:
        """Return the whole file; raise FileNotFoundError without it."""

    def read_text(self) -> str:
        """Return the whole file as text."""

    def read_range(self, first: int, n_bytes: int) -> bytes:
        """Return a part of the file."""

    def read_all(self, names: Iterable[str]) -> Iterator[bytes | OSError]:
        """Yield the bytes of many small files of this folder in order, or the error in their place."""

    def write_bytes(self, data: bytes, /) -> object:
        """Write a file that nobody reads yet."""

    def write_whole(self, name: str, data: bytes) -> None:
        """Write a file of this run whole or not at all, and durably."""

    def create_whole(self, name: str, data: bytes) -> bool:
        """Write a file of this run durably unless it exists; return whether this call made it."""

    def writing(self) -> AbstractContextManager[BinaryIO]:
        """Open a file for writing that is there, whole, once the context ends well; nothing is fsynced."""

    def touch(self) -> None:
        """Make an empty file."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete a file."""

    def delete_all(self, names: Iterable[str]) -> None:
        """Delete files of this folder durably; those that are gone already don't matter."""

    def delete_tree(self) -> None:
        """Delete the folder and all that is in it."""

    def clear_temporary(self) -> None:
        """Delete what dead attempts left in this run; whoever holds the lock may, since nobody else is writing."""

    def quiet_mark(self) -> str | None:
        """Return a mark of what the folder holds, the same until something is added or removed; None if unsure."""

    def file_names(self) -> Iterator[str]:
        """Yield the names of the files directly in the folder; nothing where there is no such folder."""

    def names_below(self) -> Iterator[str]:
        """Yield the names of all files in the folder, at any depth."""

    def folders(self) -> list[str]:
        """List the folders directly in this one, sorted; links and hidden ones are left out."""

    def each(self, call: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """Call a function for each item; side by side where it asks an object store."""

    def contains(self, other: Place) -> bool:
        """Say whether a place lies under this one when all links are followed; an object store has none."""

    def above(self) -> Iterator[Place]:
        """Yield the places that this one lies in, from the nearest on."""

    def free_bytes(self) -> int | None:
        """Return the free bytes of the file system that will hold this; None where there is no end."""

    def for_zarr(self, read_only: bool = True) -> Any:
        """Return what zarr and xarray take to read, or write, a group here."""


def place_of(text: PlaceLike) -> Place:
    """Return the place that a text names: `s3://bucket/prefix` and the like, or a path; see `plain_place`."""
    if isinstance(text, LocalPath | ObjectPath):
        return text
    plain = plain_place(os.fspath(text))  # type: ignore[arg-type]  # every Place is one of the two
    return ObjectPath(plain) if is_url(plain) else LocalPath(plain)


def groups_in(folder: Place) -> list[str]:
    """List the Zarr groups directly in a folder, sorted."""
    names = folder.folders()
    there = folder.each(lambda name: (folder / name / "zarr.json").is_file(), names)
    return [name for name, is_group in zip(names, there, strict=True) if is_group]


def plain_place(text: str) -> str:
    """Return a place with the path in place of `file://…`, and the scheme of an object store in small letters.

    Raises ValueError for another scheme, which would only make a directory of that name.
    """
    found = URL.fullmatch(text)
    if found is None:
        return text
    scheme = found[1].lower()
    slashes = found[2]
    rest = found[3]
    if scheme == "file":
        host, slash, path = rest.partition("/") if slashes == "//" else ("", "/", rest)
        if host not in ("", "localhost") or not slash:
            raise ValueError(
                f"{text} names a file on {host!r}; expected an absolute path on this machine, such as "
                "file:///data/run, or the path alone."
            )
        return unquote(f"/{path}")
    if scheme in SCHEMES and slashes == "//":
        return f"{scheme}://{rest}"
    if slashes == "//" or scheme in SCHEMES:
        raise ValueError(
            f"{text} is no place for a run; expected a path, file:///path, or an object store's "
            f"{', '.join(f'{name}://' for name in SCHEMES)} with both slashes. Name another place."
        )
    return text
