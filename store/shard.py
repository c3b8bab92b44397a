"""Write one Zarr v3 shard file (`sharding_indexed`, index at the end) chunk by chunk, in any order.

The bytes are standard: zarr-python, tensorstore and zarrs read them. Every chunk starts on a 4 KiB boundary, so that
the file can be written with O_DIRECT and mapped into memory; gaps between chunks are legal in the format.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from math import prod
from pathlib import Path

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd

PAGE = 4096
MISSING = 2**64 - 1
CRC_BYTES = 4


def round_up(n_bytes: int) -> int:
    """Round a byte count up to whole pages of 4096 bytes."""
    return -(-n_bytes // PAGE) * PAGE


def crc32c(data: object) -> bytes:
    """Return the little-endian CRC32C of a bytes-like object, as Zarr's `crc32c` codec stores it."""
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def page_buffer(n_bytes: int) -> np.ndarray:
    """Allocate page-aligned uint8 memory with room for `n_bytes`, a checksum and padding to whole pages."""
    return np.frombuffer(mmap.mmap(-1, round_up(n_bytes + CRC_BYTES)), np.uint8)


def encode_index(entries: np.ndarray) -> bytes:
    """Serialise the shard index: (offset, nbytes) uint64 pairs in C order, then their CRC32C."""
    body = entries.astype("<u8").tobytes()
    return body + crc32c(body)


def decode_index(tail: bytes, n_chunks: int) -> np.ndarray:
    """Parse a shard index and check its checksum.

    Returns uint64 [n_chunks, 2]. Raises ValueError on a wrong length or checksum.
    """
    expected = 16 * n_chunks + CRC_BYTES
    if len(tail) != expected:
        raise ValueError(f"shard index has {len(tail)} bytes, expected {expected}; the file is cut short or foreign")
    body, check = tail[:-CRC_BYTES], tail[-CRC_BYTES:]
    if crc32c(body) != check:
        raise ValueError("shard index does not match its CRC32C; the file is damaged")
    return np.frombuffer(body, "<u8").reshape(n_chunks, 2)


class ShardWriter:
    """Stream chunks into one temporary shard file; `commit` makes it whole and durable, `discard` removes it.

    `grid` is the number of inner chunks along each dimension. `level` is None for raw chunks or a zstd level.
    One writer belongs to one thread at a time.
    """

    def __init__(self, path: Path, grid: Sequence[int], level: int | None = None, direct: bool = True) -> None:
        self.path = path
        self.grid = tuple(grid)
        self._codec = None if level is None else Zstd(level=level, checksum=False)
        self._index = np.full((prod(self.grid), 2), MISSING, np.uint64)
        self._end = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._direct = False
        if direct and hasattr(os, "O_DIRECT"):
            try:
                self._file = os.open(path, flags | os.O_DIRECT, 0o644)
                self._direct = True
            except OSError:
                self._file = os.open(path, flags, 0o644)
        else:
            self._file = os.open(path, flags, 0o644)
        self._scratch: np.ndarray | None = None

    def put(self, index: Sequence[int], chunk: np.ndarray) -> None:
        """Append one chunk, given as a C-contiguous array of the inner chunk's shape and the stored dtype."""
        data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
        if self._codec is not None:
            data = np.frombuffer(self._codec.encode(data), np.uint8)
        if self._scratch is None or len(self._scratch) < round_up(len(data) + CRC_BYTES):
            self._scratch = page_buffer(len(data))
        self._scratch[: len(data)] = data
        self._append(index, self._scratch, len(data))

    def put_pages(self, index: Sequence[int], pages: np.ndarray, n_bytes: int) -> None:
        """Append a chunk that already lies in a `page_buffer`, without copying it when it is stored raw."""
        if self._codec is None:
            self._append(index, pages, n_bytes)
        else:
            self.put(index, pages[:n_bytes])

    def commit(self) -> int:
        """Write the index, cut the file to its exact length, fsync and close; return the length in bytes."""
        tail = encode_index(self._index)
        pages = page_buffer(len(tail))
        pages[: len(tail)] = np.frombuffer(tail, np.uint8)
        self._write(pages[: round_up(len(tail))])
        length = self._end + len(tail)
        os.ftruncate(self._file, length)
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1
        return length

    def discard(self) -> None:
        """Close and delete the temporary file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self.path.unlink(missing_ok=True)

    def _append(self, index: Sequence[int], pages: np.ndarray, n_bytes: int) -> None:
        flat = int(np.ravel_multi_index(tuple(index), self.grid))
        if self._index[flat, 0] != MISSING:
            raise ValueError(f"chunk {tuple(index)} of {self.path.name} was written twice; each chunk is put once")
        stored = n_bytes + CRC_BYTES
        pages[n_bytes:stored] = np.frombuffer(crc32c(pages[:n_bytes]), np.uint8)
        padded = round_up(stored)
        pages[stored:padded] = 0
        self._write(pages[:padded])
        self._index[flat] = (self._end, stored)
        self._end += padded

    def _write(self, pages: np.ndarray) -> None:
        view, offset = memoryview(pages.data), self._end
        while view:
            try:
                written = os.pwrite(self._file, view, offset)
            except OSError as error:
                if not self._direct or error.errno != 22:
                    raise
                self._leave_direct()
                continue
            offset += written
            view = view[written:]
            if view and written % PAGE and self._direct:
                self._leave_direct()

    def _leave_direct(self) -> None:
        import fcntl

        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._direct = False
