"""Write one Zarr v3 shard file (`sharding_indexed`, index at the end) chunk by chunk, in any order.

The bytes are standard: zarr-python, tensorstore and zarrs read them. Every chunk starts on a 4 KiB boundary, so that
the file can be written with O_DIRECT and mapped into memory; gaps between chunks are legal in the format.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import BinaryIO

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


def _find_checksum() -> Callable[[np.ndarray], int]:
    """Return the CRC32C of contiguous uint8: the library's C function, which runs beside other threads.

    Called through google_crc32c it would hold the interpreter's lock. Where its name is not exported, that is the way.
    """
    try:
        # A chunk is megabytes long: other threads should run while it is summed.
        from google_crc32c import _crc32c

        function = ctypes.CDLL(_crc32c.__file__).crc32c_value
    except (ImportError, OSError, AttributeError):
        return lambda data: int(google_crc32c.value(data))
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_uint32
    return lambda data: int(function(data.ctypes.data, data.nbytes))


checksum_of = _find_checksum()


def page_buffer(n_bytes: int) -> np.ndarray:
    """Allocate page-aligned uint8 memory with room for `n_bytes`, a checksum and padding to whole pages."""
    # O_DIRECT wants memory at page boundaries, which numpy's allocator does not promise. Private anonymous maps
    # are zero, and huge pages save faults on slabs of megabytes.
    memory = mmap.mmap(
        -1, round_up(n_bytes + CRC_BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


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
        raise ValueError(
            f"shard index has {len(tail)} bytes, expected {expected}; the file is cut short or foreign"
        )
    # The index is checked before an offset in it is believed.
    body = tail[:-CRC_BYTES]
    check = tail[-CRC_BYTES:]
    if crc32c(body) != check:
        raise ValueError("shard index does not match its CRC32C; the file is damaged")
    return np.frombuffer(body, "<u8").reshape(n_chunks, 2)


def shard_sum(file: BinaryIO, n_chunks: int) -> int:
    """Read a shard and return its sum: the CRC32C of its chunks' checksums in the order of the file, then of its index.

    (The CRC32C of the bytes would not do: of anything that ends with its own CRC32C, it is always the same.) Raises
    ValueError where a chunk or the index does not match its checksum, or a gap is not zero.
    """
    tail = 16 * n_chunks + CRC_BYTES
    length = file.seek(0, os.SEEK_END)
    file.seek(max(length - tail, 0))
    index = decode_index(file.read(), n_chunks)
    crc = 0
    at = file.seek(0)
    # In the order of the file, so that what lies between two chunks is seen and must be zero: a shard has no
    # place where damage goes unnoticed.
    for offset, n_bytes in sorted((int(o), int(n)) for o, n in index if o != MISSING):
        if not at <= offset <= offset + n_bytes <= length - tail or any(file.read(offset - at)):
            raise ValueError("shard has something between its chunks; the file is damaged")
        data = file.read(n_bytes - CRC_BYTES)
        check = file.read(CRC_BYTES)
        if crc32c(data) != check:
            raise ValueError("a chunk does not match its CRC32C; the file is damaged")
        crc = int(google_crc32c.extend(crc, check))
        at = offset + n_bytes
    if any(file.read(length - tail - at)):
        raise ValueError("shard has something behind its chunks; the file is damaged")
    return int(google_crc32c.extend(crc, index.tobytes()))


def stored_sum(data: np.ndarray, index: np.ndarray) -> int:
    """Return a shard's sum from its bytes as `shard_sum` does, trusting the checksums that are stored in it.

    It tells which shard this is; whether the chunks match their checksums is another question. Raises ValueError for
    an index that points outside the file.
    """
    # Vectorised, since it is asked of every shard that a process opens: a gather of four bytes a chunk.
    there = index[index[:, 0] != MISSING]
    in_order = there[np.argsort(there[:, 0])]
    ends = in_order.sum(1).astype(np.int64)
    if len(ends) and not CRC_BYTES <= int(ends.min()) <= int(ends.max()) <= len(data):
        raise ValueError("shard index points outside of the file; the file is damaged")
    checks = data[(ends - CRC_BYTES)[:, None] + np.arange(CRC_BYTES)]
    return int(google_crc32c.extend(google_crc32c.value(checks.tobytes()), index.tobytes()))


class ShardWriter:
    """Stream chunks into one temporary shard file; `commit` makes it whole and durable, `discard` removes it.

    `grid` is the number of inner chunks along each dimension. `level` is None for raw chunks or a zstd level.
    One writer belongs to one thread at a time.
    """

    def __init__(
        self, path: Path, grid: Sequence[int], level: int | None = None, direct: bool = True
    ) -> None:
        self.path = path
        self.grid = tuple(grid)
        if level is None:
            self._codec = None
        else:
            self._codec = Zstd(level=level, checksum=False)
        # Chunks that are never put stay MISSING: tiles above the diagonal take no bytes.
        self._index = np.full((prod(self.grid), 2), MISSING, np.uint64)
        self._end = 0
        self._crc = 0
        # O_EXCL: a temporary name belongs to one writer, and a file that is there already is somebody else's.
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._direct = direct and _go_direct(self._file)
        self._scratch: np.ndarray | None = None

    def put(self, index: Sequence[int], chunk: np.ndarray) -> None:
        """Append one chunk, given as a C-contiguous array of the inner chunk's shape and the stored dtype."""
        data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
        if self._codec is not None:
            data = np.frombuffer(self._codec.encode(data), np.uint8)
        if self._scratch is None or len(self._scratch) < round_up(len(data) + CRC_BYTES):
            self._scratch = page_buffer(len(data))
        self._scratch[: len(data)] = data
        pages = self._scratch[: round_up(len(data) + CRC_BYTES)]
        # `_seal` moves the end on, so that the chunk begins its size before it.
        self._seal([index], pages[None], len(data))
        self._write(pages, self._end - pages.size)

    def put_pages(self, indices: Sequence[Sequence[int]], pages: np.ndarray, n_bytes: int) -> None:
        """Append chunks that lie in the rows of `pages` (uint8 [n, whole pages]), raw ones without copying them."""
        if self._codec is not None:
            for index, row in zip(indices, pages, strict=True):
                self.put(index, row[:n_bytes])
            return
        self._seal(indices, pages, n_bytes)
        self._write(pages.reshape(-1), self._end - pages.size)

    def commit(self) -> tuple[int, int]:
        """Write the index, cut the file to its exact length, fsync and close.

        Returns the length in bytes and the file's sum, see `shard_sum`.
        """
        # With O_DIRECT only whole pages can be written: the index goes out padded and the file is cut back to its
        # length. The fsync comes last, after the cut, and before anybody renames the file.
        tail = encode_index(self._index)
        pages = page_buffer(len(tail))
        pages[: len(tail)] = np.frombuffer(tail, np.uint8)
        # The sum of the shard covers the checksums of its chunks and the index, not its own trailing checksum.
        crc = int(google_crc32c.extend(self._crc, tail[:-CRC_BYTES]))
        self._write(pages[: round_up(len(tail))], self._end)
        length = self._end + len(tail)
        os.ftruncate(self._file, length)
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1
        return length, crc

    def discard(self) -> None:
        """Close and delete the temporary file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self.path.unlink(missing_ok=True)

    def _seal(self, indices: Sequence[Sequence[int]], pages: np.ndarray, n_bytes: int) -> None:
        """Note where chunks go that lie in the rows of `pages`, and put a checksum and zeros behind each."""
        # Each chunk once: a second write would leave the first one's bytes unreachable in the file.
        flat = np.ravel_multi_index(tuple(np.asarray(indices).T), self.grid)
        if (self._index[flat, 0] != MISSING).any() or len(set(flat.tolist())) < len(flat):
            raise ValueError(
                f"a chunk of {self.path.name} among {list(indices)} was written twice; each is put once"
            )
        n, padded = pages.shape
        stored = n_bytes + CRC_BYTES
        # Layout of a row of `pages`: the chunk, its CRC32C, zeros up to the page. It goes to the disk as it lies.
        checks = np.array([google_crc32c.value(data) for data in pages[:, :n_bytes]], "<u4")
        pages[:, n_bytes:stored] = checks.view(np.uint8).reshape(n, CRC_BYTES)
        pages[:, stored:] = 0
        self._index[flat, 0] = self._end + padded * np.arange(n, dtype=np.uint64)
        self._index[flat, 1] = stored
        self._crc = int(google_crc32c.extend(self._crc, checks.tobytes()))
        self._end += pages.size

    def _write(self, pages: np.ndarray, offset: int) -> None:
        # Some file systems take O_DIRECT at open and refuse it at the first write (EINVAL), or write a part that
        # ends inside a page; both go on through the page cache, with the same bytes.
        view = memoryview(pages.data)
        while view:
            try:
                written = os.pwrite(self._file, view, offset)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._leave_direct()
                continue
            offset += written
            view = view[written:]
            if view and written % PAGE and self._direct:
                self._leave_direct()

    def _leave_direct(self) -> None:
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._direct = False


def _go_direct(file: int) -> bool:
    """Write around the page cache from now on; return whether the file system can.

    Not asked for in `open`: where it is refused there, the file exists already, and could not be created once more.
    """
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError:
        return False
    return True
