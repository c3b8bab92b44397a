"""Runs in an object store: the part of `pathlib.Path` that a run needs. This is the only module that imports obstore.

Credentials come from the store's standard chain: the environment, then (with boto3) ~/.aws and instance metadata, else
obstore's own chain. They are never kept here, nor part of a message.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache, lru_cache, partial
from pathlib import Path, PurePosixPath
from random import random
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO, Literal, TypeVar

from headwater.store.files import FileState
from headwater.store.versions import check_versions
from headwater.store.writer import INTERNAL

SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss")
PUT_BYTES = 64 << 20
PART_BYTES = 16 << 20
READ_BYTES = 8 << 20
REQUEST_SECONDS = 300
RETRIES: dict[str, Any] = {
    "max_retries": 12,
    "backoff": {
        "init_backoff": timedelta(milliseconds=100),
        "max_backoff": timedelta(seconds=15),
        "base": 2,
    },
    "retry_timeout": timedelta(minutes=5),
}
ATTEMPTS = 10
REQUESTS = 32
NO_BUCKET = "{}: there is no such bucket"
PAGE = 1000
# Whether the store of a prefix has conditional writes, as it answered this process.
_CONDITIONS: dict[tuple[str, int], bool] = {}
T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")


class StoreError(OSError):
    """An object store refused, or cannot be reached; what was committed stays."""


class BrokenAnswer(StoreError):
    """A store's answer broke off: the same question can be asked again."""


class ObjectPath:
    """An object, or a prefix of objects, written like a path: `ObjectPath("s3://bucket/run") / "resid" / "zarr.json"`.

    An object is written whole or not at all, and is durable when the call returns. See `headwater.store.place.Place`.
    """

    folder_kind = "prefix"
    local = None

    def __init__(self, root: str, key: str = "") -> None:
        self.root = root.rstrip("/")
        self.key = key

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(self.root, f"{self.key}/{name}".strip("/"))

    def __str__(self) -> str:
        return f"{self.root}/{self.key}".rstrip("/")

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def name(self) -> str:
        """The last part."""
        return str(self).rpartition("/")[2]

    @property
    def remote(self) -> ObjectPath:
        """The path itself."""
        return self

    def relative_to(self, other: ObjectPath) -> PurePosixPath:
        """Return the path inside a prefix."""
        return PurePosixPath(str(self)).relative_to(str(other))

    def with_name(self, name: str) -> ObjectPath:
        """Return a neighbour: `s3://bucket/run` → `s3://bucket/<name>`."""
        return ObjectPath(str(self).rpartition("/")[0], name)

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        try:
            self.size()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether there are objects under this prefix."""
        return _ask(
            self,
            lambda: any(
                map(len, _obstore().list(_store(self.root), self.key or None, chunk_size=1))
            ),
        )

    def exists(self) -> bool:
        """Whether there is anything here."""
        return self.is_file() or self.is_dir()

    def size(self) -> int:
        """Return the object's bytes; raise FileNotFoundError without it."""
        return self.head()[0]

    def head(self) -> tuple[int, float, str]:
        """Return the object's bytes, its time and the tag of this version; raise FileNotFoundError without it."""
        meta = _ask(self, lambda: _obstore().head(_store(self.root), self.key))
        return int(meta["size"]), meta["last_modified"].timestamp(), str(meta["e_tag"])

    def state(self) -> FileState:
        """Return the object's state."""
        n_bytes, modified, tag = self.head()
        return FileState(n_bytes, modified, f"{tag} {modified}")

    def read_bytes(self) -> bytes:
        """Return the whole object; raise FileNotFoundError without it."""
        return self.read_with_tag()[0]

    def read_with_tag(self) -> tuple[bytes, str]:
        """Return the whole object and the tag of this version of it."""

        def get() -> tuple[bytes, str]:
            found = _obstore().get(_store(self.root), self.key)
            return bytes(found.bytes()), str(found.meta["e_tag"])

        return _ask(self, get)

    def read_text(self) -> str:
        """Return the whole object as UTF-8 text."""
        return self.read_bytes().decode()

    def read_range(self, first: int, n_bytes: int) -> bytes:
        """Return a part of the object."""
        return self.read_ranges([(first, n_bytes)])[0]

    def read_all(self, names: Iterable[str]) -> Iterator[bytes | OSError]:
        """Yield the bytes of objects under this prefix in order, or the error in their place; fetched side by side."""

        def read(name: str) -> bytes | OSError:
            try:
                return (self / name).read_bytes()
            except OSError as error:
                return error

        with ThreadPoolExecutor(REQUESTS) as pool:
            yield from pool.map(read, names)

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        """Return parts (offset, bytes) of the object; neighbours are fetched together."""
        starts, lengths = zip(*ranges, strict=True)

        def get() -> list[bytes]:
            parts = _obstore().get_ranges(
                _store(self.root), self.key, starts=starts, lengths=lengths
            )
            return [bytes(part) for part in parts]

        return _ask(self, get)

    def read_end(self, n_bytes: int) -> bytes:
        """Return the last bytes of the object."""
        last = {"range": {"suffix": n_bytes}}
        return _ask(
            self, lambda: bytes(_obstore().get(_store(self.root), self.key, options=last).bytes())
        )

    def open(self, mode: Literal["rb"] = "rb", /) -> BinaryIO:
        """Open the object for reading, with seeks."""
        reader = _ask(
            self,
            lambda: _obstore().open_reader(_store(self.root), self.key, buffer_size=READ_BYTES),
        )
        return io.BufferedReader(_Reader(self, reader), READ_BYTES)

    def iterdir(self) -> Iterator[ObjectPath]:
        """Yield the objects under this prefix, at any depth."""
        after = None
        while page := _ask(self, partial(self._page, after)):
            yield from (ObjectPath(self.root, name) for name in page)
            after = page[-1]

    def file_names(self) -> Iterator[str]:
        """Yield the names of the objects directly under this prefix."""
        yield from (name for name in self.names_below() if "/" not in name)

    def names_below(self) -> Iterator[str]:
        """Yield the names of all objects under this prefix."""
        yield from (str(item.relative_to(self)) for item in self.iterdir())

    def folders(self) -> list[str]:
        """List the names of the prefixes directly under this one, sorted; hidden ones are left out."""
        found = _ask(
            self, lambda: _obstore().list_with_delimiter(_store(self.root), self.key or None)
        )
        names = [prefix.rpartition("/")[2] for prefix in found["common_prefixes"]]
        return sorted(name for name in names if not name.startswith("."))

    def each(self, call: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """Call a function for each item, side by side."""
        with ThreadPoolExecutor(REQUESTS) as pool:
            return list(pool.map(call, items))

    def contains(self, other: object) -> bool:
        """Say that it is so: an object store has no links that lead out of a prefix."""
        return True

    def above(self) -> Iterator[ObjectPath]:
        """Yield the prefixes that this one lies in, from the bucket on."""
        scheme, _, rest = str(self).partition("://")
        bucket, *names = rest.split("/")
        for i in range(len(names)):
            yield ObjectPath(f"{scheme}://{bucket}", "/".join(names[:i]))

    def free_bytes(self) -> None:
        """Say that there is no end."""
        return None

    def quiet_mark(self) -> None:
        """Say that none is sure."""
        return None

    def touch(self) -> None:
        """Write an empty object."""
        self.write_bytes(b"")

    def _page(self, after: str | None) -> list[str]:
        """List up to PAGE objects behind a key."""
        stream = _obstore().list(_store(self.root), self.key or None, offset=after, chunk_size=PAGE)
        return [item["path"] for item in next(iter(stream), [])]

    def write_bytes(self, data: bytes) -> None:
        """Write the object in one request."""
        _ask(self, lambda: _obstore().put(_store(self.root), self.key, data, use_multipart=False))

    def write_whole(self, name: str, data: bytes) -> None:
        """Write an object of this run."""
        (self / name).write_bytes(data)

    def create_whole(self, name: str, data: bytes) -> bool:
        """Write an object of this run unless it exists; return whether this call made it."""
        return (self / name).create(data)

    @contextmanager
    def writing(self) -> Iterator[BinaryIO]:
        """Open a file for writing that is sent at the end."""
        with NamedTemporaryFile(prefix="hw-object-") as file:
            yield file  # type: ignore[misc]  # the wrapper has all methods of its file
            file.flush()
            self.put_file(Path(file.name))

    def put_file(self, source: Path) -> None:
        """Copy a file into the object, in one request up to 64 MiB, in parts beyond."""
        size = {"use_multipart": source.stat().st_size > PUT_BYTES, "chunk_size": PART_BYTES}
        _ask(self, lambda: _obstore().put(_store(self.root), self.key, source, **size))

    def create(self, data: bytes) -> bool:
        """Write the object unless it exists; return whether it is ours.

        The condition is the store's own (If-None-Match) where it has that, else a look before. A request whose answer
        was lost is told from another's by its bytes. Where nothing is there after a refusal, two requests met
        (409 ConditionalRequestConflict), or the object was deleted meanwhile: it is tried again.
        """
        for attempt in range(ATTEMPTS):
            try:
                self._put_if(data, "create")
                return True
            except FileExistsError:
                try:
                    return self.read_bytes() == data
                except FileNotFoundError:
                    if attempt == ATTEMPTS - 1:
                        raise
                    _rest(attempt)
            except NotImplementedError:
                if self.is_file():
                    return self.read_bytes() == data
                self.write_bytes(data)
                return True
            except StoreError:
                if attempt == ATTEMPTS - 1:
                    raise
                _rest(attempt)
        raise AssertionError("unreachable")

    def replace_version(self, data: bytes, tag: str) -> str:
        """Write the object if it still has this tag; return the new one, or raise FileExistsError."""
        return self._put_if(data, {"e_tag": tag})

    def _put_if(self, data: bytes, mode: Any) -> str:
        """Write the object under a condition; return its tag.

        Raises FileExistsError where the condition does not hold, and NotImplementedError where the store has none. A
        store that has none answers 501, which obstore takes for an error that passes, and tries again and again: so
        the first request to a store goes through a client that asks once, and the answer is remembered.
        """
        place = (self.root, os.getpid())
        if place not in _CONDITIONS:
            with suppress(StoreError):
                return self._put_once_if(_store(self.root, patient=False), data, mode)
        if _CONDITIONS.get(place, True):
            return self._put_once_if(_store(self.root), data, mode)
        raise NotImplementedError(f"the store of {self} has no conditional writes")

    def _put_once_if(self, store: Any, data: bytes, mode: Any) -> str:
        errors = _errors()
        place = (self.root, os.getpid())
        with _explained(self):
            try:
                tag = str(_obstore().put(store, self.key, data, mode=mode)["e_tag"])
            except (errors.AlreadyExistsError, errors.PreconditionError) as error:
                _CONDITIONS[place] = True
                raise FileExistsError(f"{self} was written by another process") from error
            except (errors.NotSupportedError, errors.GenericError) as error:
                unknown = isinstance(error, errors.NotSupportedError)
                if not unknown and "501 Not Implemented" not in str(error):
                    raise
                _CONDITIONS[place] = False
                raise NotImplementedError(
                    f"the store of {self} has no conditional writes"
                ) from error
        _CONDITIONS[place] = True
        return tag

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object; without it nothing happens, whatever `missing_ok` says."""
        self.delete([self])

    def delete(self, objects: Iterable[ObjectPath]) -> None:
        """Delete objects of the same run, many a request."""
        if keys := [item.key for item in objects]:
            _ask(self, lambda: _obstore().delete(_store(self.root), keys))

    def delete_all(self, names: Iterable[str]) -> None:
        """Delete objects under this prefix."""
        self.delete([self / name for name in names])

    def delete_tree(self) -> None:
        """Delete all objects under this prefix."""
        self.delete(list(self.iterdir()))

    def clear_temporary(self) -> None:
        """Delete what dead attempts left."""
        (self / INTERNAL / "tmp").delete_tree()

    def absolute(self) -> ObjectPath:
        """Return the path itself."""
        return self

    resolve = absolute

    def for_zarr(self, read_only: bool = True) -> Any:
        """Return the prefix as a store for zarr and xarray; one client serves all prefixes of a run.

        To write, the prefix is a root: zarr would make groups of the prefixes above, beside other runs.
        """
        if not read_only:
            return ObjectPath(str(self))._zarr_store(read_only)
        return self._zarr_store(read_only)

    def _zarr_store(self, read_only: bool) -> Any:
        from zarr.storage import ObjectStore, StorePath

        store: Any = ObjectStore(_store(self.root), read_only=read_only)
        return StorePath(store, self.key) if self.key else store


class _Reader(io.RawIOBase):
    """obstore's reader as a raw file: io.BufferedReader does the rest."""

    def __init__(self, path: ObjectPath, reader: Any) -> None:
        self._path = path
        self._reader = reader

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        at = self._reader.tell()

        def read() -> bytes:
            self._reader.seek(at)
            return bytes(self._reader.read(len(buffer)))

        data = _ask(self._path, read)
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._reader.seek(offset, whence))

    def tell(self) -> int:
        return int(self._reader.tell())


def is_url(text: str) -> bool:
    """Say whether a text names a place in an object store."""
    return text.partition("://")[0] in SCHEMES and "://" in text


def _obstore() -> Any:
    try:
        import obstore
    except ImportError as error:
        raise ValueError(
            "runs in an object store need the package obstore: run `pip install obstore`."
        ) from error
    _check_obstore()
    return obstore


@cache
def _check_obstore() -> None:
    check_versions("obstore")


def _errors() -> Any:
    import obstore.exceptions

    return obstore.exceptions


def _store(root: str, patient: bool = True) -> Any:
    """Return obstore's handle of a prefix, one a process (its threads do not survive a fork) and endpoint."""
    _obstore()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return _connect(root, os.getpid(), endpoint, patient)


@lru_cache(64)
def _connect(root: str, process: int, endpoint: str, patient: bool) -> Any:
    from obstore.store import from_url

    scheme, _, rest = root.partition(":")
    if not rest.strip("/"):
        raise ValueError(f"{scheme}:// names no bucket; expected {scheme}://BUCKET/PREFIX.")
    options: dict[str, Any] = {
        "timeout": f"{REQUEST_SECONDS} seconds",
        "connect_timeout": "20 seconds",
    }
    retries = RETRIES if patient else RETRIES | {"max_retries": 0}
    more: dict[str, Any] = {"client_options": options, "retry_config": retries}
    if scheme in ("s3", "s3a"):
        more |= {"config": {"endpoint": endpoint}} if endpoint else {}
        options["allow_http"] = endpoint.startswith("http://")
        if (provider := _aws_credentials()) is not None:
            more["credential_provider"] = provider
    return from_url(root, **more)


def _aws_credentials() -> Any:
    """Return boto3's credentials where the environment has none: ~/.aws, web identity, containers, instances."""
    if "AWS_ACCESS_KEY_ID" in os.environ or "AWS_SKIP_SIGNATURE" in os.environ:
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return None
    try:
        return Boto3CredentialProvider()
    except ValueError as error:
        raise StoreError(
            "there are no credentials for S3: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or make "
            "~/.aws/credentials (AWS_SKIP_SIGNATURE=true reads a public bucket)"
        ) from error


def _ask(path: ObjectPath, call: Callable[[], T]) -> T:
    """Ask a store for something; again where an answer broke off, which obstore does not try again by itself."""
    for attempt in range(ATTEMPTS):
        try:
            with _explained(path):
                return call()
        except BrokenAnswer:
            if attempt == ATTEMPTS - 1:
                raise
            _rest(attempt)
    raise AssertionError("unreachable")


def _rest(attempt: int) -> None:
    time.sleep(min(0.1 * 2**attempt, 15) * (0.5 + random()))


@contextmanager
def _explained(path: ObjectPath) -> Iterator[None]:
    """Turn obstore's errors into FileNotFoundError, PermissionError and StoreError with one line each."""
    try:
        yield
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise StoreError(NO_BUCKET.format(path)) from error
        raise FileNotFoundError(f"there is no object {path}") from error
    except (StoreError, FileExistsError, NotImplementedError, ValueError):
        raise
    except Exception as error:
        if not type(error).__module__.startswith(("obstore", "builtins")):
            raise
        if "NoSuchBucket" in str(error):
            raise StoreError(NO_BUCKET.format(path)) from error
        kind = BrokenAnswer if "body" in str(error).partition("\n")[0] else StoreError
        raise kind(f"{path}: {_short(error)}") from error


def _short(error: Exception) -> str:
    """Say what a store answered, without obstore's debugging output."""
    text = str(error)
    code = re.search(r"<Code>(\w+)</Code>", text)
    status = re.search(r"non-2xx status code: (\d+ [A-Z][\w ]*)", text)
    if code or status:
        return f"the store answered {' '.join(m[1] for m in (status, code) if m)}"
    return " ".join(text.partition("\n")[0].split())[:300]
