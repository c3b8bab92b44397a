"""Shards for reading: a file that is mapped into memory, or an object that is fetched chunk by chunk."""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from headwater.store.objects import ObjectPath
from headwater.store.place import Place
from headwater.store.shard import CRC_BYTES, decode_index, stored_sum

KEPT_CHECKS = 1 << 17


class Version(NamedTuple):
    """What tells a file from another that takes its name, or from itself after it was written to."""

    device: int
    inode: int
    n_bytes: int
    modified: int


class Checks:
    """What this process knows of one version of a shard: length and sum, and which chunks match their checksums."""

    def __init__(self, n_chunks: int) -> None:
        self.sum: tuple[int, int] | None = None
        self.chunks = np.zeros(n_chunks, bool)


class ShardFile(Protocol):
    """A shard's `index`, uint64 [chunk, (offset, bytes)], its bytes, and what was checked of it."""

    index: np.ndarray

    @property
    def checks(self) -> Checks:
        """What was checked of it."""

    @property
    def version(self) -> Version | None:
        """The version of the file; None for an object."""

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Return the bytes, uint8, of each (offset, bytes)."""

    def sum(self) -> tuple[int, int] | None:
        """Return the shard's length and sum as the ledger records them; None where that would cost requests."""


class MappedShard:
    """A shard on a file system. What it reads are views of the file; `checks` are those of every map of it."""

    def __init__(self, path: Path, n_chunks: int) -> None:
        with path.open("rb") as file:
            version = version_of(os.fstat(file.fileno()))
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self.version: Version | None = version
        self._data = np.frombuffer(self._map, np.uint8)
        self.index = decode_index(self._data[-(16 * n_chunks + CRC_BYTES) :].tobytes(), n_chunks)
        self.checks = _checks.of(version, n_chunks)

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Return views of the map."""
        return [self._data[offset : offset + n_bytes] for offset, n_bytes in ranges]

    def sum(self) -> tuple[int, int]:
        """Return length and sum; of each chunk only the page that holds its checksum is read, once."""
        if self.checks.sum is None:
            self.checks.sum = len(self._data), self._sum()
        return self.checks.sum

    def _sum(self) -> int:
        if hasattr(mmap, "MADV_RANDOM"):  # no reading ahead between them
            self._map.madvise(mmap.MADV_RANDOM)
        try:
            return stored_sum(self._data, self.index)
        finally:
            if hasattr(mmap, "MADV_RANDOM"):
                self._map.madvise(mmap.MADV_NORMAL)


class ObjectShard:
    """A shard in an object store: the index is fetched once, chunks when they are read, and checked each time."""

    version: Version | None = None

    def __init__(self, path: ObjectPath, n_chunks: int) -> None:
        self._path = path
        self.index = decode_index(path.read_end(16 * n_chunks + CRC_BYTES), n_chunks)

    @property
    def checks(self) -> Checks:
        """Nothing: the next request may be answered with other bytes."""
        return Checks(len(self.index))

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Fetch parts of the object."""
        return [np.frombuffer(part, np.uint8) for part in self._path.read_ranges(ranges)]

    def sum(self) -> None:
        """Leave it: the checksums of all chunks would be a request each."""
        return None


class _AllChecks:
    """The checks of every version of a file that this process has read, up to KEPT_CHECKS of them."""

    def __init__(self) -> None:
        self._known: OrderedDict[Version, Checks] = OrderedDict()
        self._lock = threading.Lock()

    def clear(self) -> None:
        with self._lock:
            self._known.clear()

    def of(self, version: Version, n_chunks: int) -> Checks:
        with self._lock:
            # Maps of one version share what is known of it; the least recently used versions are forgotten.
            found = self._known.get(version)
            if found is None or len(found.chunks) != n_chunks:
                found = self._known[version] = Checks(n_chunks)
                if len(self._known) > KEPT_CHECKS:
                    self._known.popitem(last=False)
            self._known.move_to_end(version)
            return found


_checks = _AllChecks()


def forget_checks() -> None:
    """Check everything anew, as a process does that has read nothing yet."""
    _checks.clear()


def version_of(stat: os.stat_result) -> Version:
    """Return the version of a file."""
    return Version(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def version_at(path: Place) -> Version | None:
    """Return the version of a shard; None in an object store, which is asked anew for every read."""
    if path.local is None:
        return None
    return version_of(os.stat(path.local))


def open_shard(path: Place, n_chunks: int) -> ShardFile:
    """Open a shard; raise FileNotFoundError without it, ValueError for one that is damaged."""
    if path.remote is not None:
        return ObjectShard(path.remote, n_chunks)
    assert path.local is not None
    return MappedShard(path.local, n_chunks)
