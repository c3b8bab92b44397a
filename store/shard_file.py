"""Shards for reading: a file that is mapped into memory, or an object that is fetched chunk by chunk."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from headwater.store.objects import ObjectPath
from headwater.store.place import Place
from headwater.store.shard import CRC_BYTES, decode_index


class ShardFile(Protocol):
    """A shard's `index`, uint64 [chunk, (offset, bytes)], and its bytes; `checked` says whether chunks need a check."""

    index: np.ndarray
    checked: bool

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Return the bytes, uint8, of each (offset, bytes)."""


class MappedShard:
    """A shard on a file system. What it reads are views of the file."""

    checked = True

    def __init__(self, path: Path, n_chunks: int) -> None:
        with path.open("rb") as file:
            self._data = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
        self.index = decode_index(self._data[-(16 * n_chunks + CRC_BYTES) :].tobytes(), n_chunks)

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Return views of the map."""
        return [self._data[offset : offset + n_bytes] for offset, n_bytes in ranges]


class ObjectShard:
    """A shard in an object store: the index is fetched once, chunks when they are read."""

    checked = False

    def __init__(self, path: ObjectPath, n_chunks: int) -> None:
        self._path = path
        self.index = decode_index(path.read_end(16 * n_chunks + CRC_BYTES), n_chunks)

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Fetch parts of the object."""
        return [np.frombuffer(part, np.uint8) for part in self._path.read_ranges(ranges)]


def open_shard(path: Place, n_chunks: int) -> ShardFile:
    """Open a shard; raise FileNotFoundError without it, ValueError for one that is damaged."""
    return ObjectShard(path, n_chunks) if isinstance(path, ObjectPath) else MappedShard(path, n_chunks)
