"""Where a run lies: a directory, or a prefix in an object store; and the few operations that differ between them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import unquote

from headwater.store.files import create_durably, sync_directory, unique_name, write_durably
from headwater.store.objects import SCHEMES, ObjectPath, is_url
from headwater.store.writer import INTERNAL

REQUESTS = 32
QUIET_SECONDS = 3.0
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)(.*)", re.DOTALL)

Place = Path | ObjectPath
A = TypeVar("A")
B = TypeVar("B")


class FileState(NamedTuple):
    """A file's bytes, the time of its last change in seconds, and a mark that differs for what is written anew."""

    n_bytes: int
    modified: float
    mark: str


def place_of(text: str | os.PathLike[str] | ObjectPath) -> Place:
    """Return the place that a text names: `s3://bucket/prefix` and the like, or a path; see `plain_place`."""
    if isinstance(text, ObjectPath):
        return text
    plain = plain_place(os.fspath(text))
    return ObjectPath(plain) if is_url(plain) else Path(plain)


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


def write_whole(run: Place, name: str, data: bytes) -> None:
    """Write a file of a run whole or not at all, and durably."""
    if isinstance(run, ObjectPath):
        (run / name).write_bytes(data)
    else:
        write_durably(run / name, data, _temporary(run, name))


def create_whole(run: Place, name: str, data: bytes) -> bool:
    """Write a file of a run durably unless it exists; return whether this call made it."""
    if isinstance(run, ObjectPath):
        return (run / name).create(data)
    return create_durably(run / name, data, _temporary(run, name))


def quiet_mark(folder: Place) -> str | None:
    """Return a mark of what a folder holds, the same as long as nothing is added or removed; None where none is sure.

    A folder that was changed a moment ago may be changed again within the same tick of its clock.
    """
    if isinstance(folder, ObjectPath):
        return None
    try:
        handle = os.open(
            folder, os.O_RDONLY | os.O_DIRECTORY
        )  # a network file system asks again at each open
    except FileNotFoundError:
        return ""
    try:
        stat = os.fstat(handle)
    finally:
        os.close(handle)
    return (
        f"{stat.st_ino} {stat.st_mtime_ns}" if time.time() - stat.st_mtime > QUIET_SECONDS else None
    )


def names_in(folder: Place) -> Iterator[str]:
    """Yield the names directly in a folder of a run; nothing where there is no such folder."""
    if isinstance(folder, ObjectPath):
        inside = (str(item.relative_to(folder)) for item in folder.iterdir())
        yield from (name for name in inside if "/" not in name)
    elif folder.is_dir():
        with os.scandir(folder) as items:
            for item in items:
                yield item.name


def file_names(folder: Place) -> Iterator[str]:
    """Yield the names of the files directly in a folder of a run: what is a folder or a link is nobody's entry."""
    if isinstance(folder, ObjectPath):
        yield from names_in(folder)
    elif folder.is_dir():
        with os.scandir(folder) as items:
            for item in items:
                if item.is_file(follow_symlinks=False):
                    yield item.name


def folders_in(folder: Place) -> list[str]:
    """List the folders directly in a folder, sorted; links and hidden ones are left out."""
    if isinstance(folder, ObjectPath):
        names = folder.folders()
    else:
        try:
            with os.scandir(folder) as items:
                names = [item.name for item in items if item.is_dir(follow_symlinks=False)]
        except OSError:
            return []
    return sorted(name for name in names if not name.startswith("."))


def groups_in(folder: Place) -> list[str]:
    """List the Zarr groups directly in a folder, sorted."""
    names = folders_in(folder)
    there = each(folder, lambda name: (folder / name / "zarr.json").is_file(), names)
    return [name for name, is_group in zip(names, there, strict=True) if is_group]


def each(place: Place, call: Callable[[A], B], items: Iterable[A]) -> list[B]:
    """Call a function for each item; side by side where it asks an object store."""
    if not isinstance(place, ObjectPath):
        return list(map(call, items))
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(call, items))


def read_all(paths: Iterable[Place]) -> Iterator[bytes | OSError]:
    """Yield the bytes of many small files in order, or the error in their place; objects are fetched side by side."""
    listed = list(paths)
    if listed and isinstance(listed[0], ObjectPath):
        with ThreadPoolExecutor(REQUESTS) as pool:
            yield from pool.map(_read, listed)
    else:
        yield from map(_read, listed)


def delete_all(folder: Place, names: Iterable[str]) -> None:
    """Delete files of one folder durably; those that are gone already don't matter."""
    if isinstance(folder, ObjectPath):
        folder.delete([folder / name for name in names])
        return
    for name in names:
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir():
        sync_directory(folder)


def clear_temporary(run: Place) -> None:
    """Delete what dead attempts left; whoever holds the lock may do this, since nobody else is writing."""
    if isinstance(run, ObjectPath):
        run.delete([item for item in (run / INTERNAL / "tmp").iterdir()])
        return
    for item in os.scandir(run / INTERNAL / "tmp"):
        if item.is_file():
            os.unlink(item.path)


def size_of(path: Place) -> int:
    """Return a file's bytes; raise FileNotFoundError without it."""
    return path.size() if isinstance(path, ObjectPath) else path.stat().st_size


def state_of(path: Place) -> FileState:
    """Return a file's state; raise FileNotFoundError without it."""
    if isinstance(path, ObjectPath):
        n_bytes, modified, tag = path.head()
        return FileState(n_bytes, modified, f"{tag} {modified}")
    stat = path.stat()
    return FileState(stat.st_size, stat.st_mtime, f"{stat.st_ino} {stat.st_mtime_ns}")


def open_place(path: Place) -> BinaryIO:
    """Open a file of a run for reading."""
    return path.open("rb")


def for_zarr(path: Place) -> Any:
    """Return what zarr and xarray take to read a place."""
    return path.zarr_store() if isinstance(path, ObjectPath) else path


def _read(path: Place) -> bytes | OSError:
    try:
        return path.read_bytes()
    except OSError as error:
        return error


def _temporary(run: Path, name: str) -> Path:
    return run / INTERNAL / "tmp" / unique_name(name.rpartition("/")[2])
