"""Read rows of an array by plain reads: exactly the bytes that are asked for, with no map that pulls in more."""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from headwater.store.layout import CODECS
from headwater.store.reader import Run, chunk_is_damaged
from headwater.store.shard import MISSING, PAGE, page_buffer, round_up
from headwater.store.shard_file import Checks, Version, version_of

KEPT_FILES = 256


class _Shard(NamedTuple):
    """A shard of which rows are read: where it lies, and the places and checks of its chunks, by their number."""

    name: str
    path: str
    version: Version | None
    chunks: np.ndarray
    checks: Checks


class RowReader:
    """Rows of an array with a leading dimension: positions of one sequence that lie inside one chunk.

    The indexes of shards that were read are kept: 16 bytes a chunk. Compressed chunks, objects and what is missing go
    the way of `RunArray`. Up to KEPT_FILES files are kept open. With `direct`, what lies on whole pages, in the file
    and in memory, is read around the page cache, where the file system allows it. A chunk of which a process reads
    rows for the first time is read whole, to compare it with its checksum. Threads may share a reader.
    """

    def __init__(self, run: Run, name: str, direct: bool = False) -> None:
        self._direct = direct and hasattr(os, "O_DIRECT")
        self._run, self._array, self._spec = run, run[name], run.spec(name)
        self._plain = CODECS[self._spec.codec] is None and run.path.local is not None
        self._row_bytes = int(np.prod(self._spec.chunk[3:])) * self._array.dtype.itemsize
        self._shards: dict[tuple[int, int], _Shard] = {}
        self._files: dict[tuple[str, Version | None], int] = {}
        self._local = threading.local()
        weakref.finalize(self, _close, self._files)

    def read(self, lead: int, sequence: int, first: int, last: int, out: np.ndarray) -> None:
        """Read positions [first, last) into `out`: contiguous, [last − first, width]."""
        if self._plain:
            shard = self._shard(lead, sequence)
        else:
            shard = None
        number, row = self._place(lead, sequence, first)
        if shard is None or shard.chunks[number, 0] == MISSING:
            out[...] = self._array[lead, sequence, first:last].reshape(out.shape)
            return
        data = out.reshape(-1).view(np.uint8)
        offset = row * self._row_bytes
        if self._run.checked and not shard.checks.chunks[number]:
            data[:] = self._whole(shard, number)[offset : offset + data.nbytes]
            return
        self._fill(shard, int(shard.chunks[number, 0]) + offset, data)

    def _whole(self, shard: _Shard, number: int) -> np.ndarray:
        """Read a chunk whole and compare it with its checksum; the bytes are valid until this thread reads another."""
        offset, n_bytes = (int(value) for value in shard.chunks[number])
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < round_up(n_bytes):
            buffer = self._local.buffer = page_buffer(n_bytes)
        stored = buffer[:n_bytes]
        self._fill(shard, offset, buffer[: round_up(n_bytes)], n_bytes)
        if chunk_is_damaged(stored):
            raise self._run.damaged(shard.name, f"chunk {number} does not match its checksum")
        shard.checks.chunks[number] = True
        return stored

    def _fill(self, shard: _Shard, offset: int, data: np.ndarray, least: int | None = None) -> None:
        n_read = self._read(shard, offset, data)
        expected = data.nbytes
        if least is not None:
            expected = least
        if n_read < expected:
            raise self._run.damaged(
                shard.name, f"gave {n_read:,} bytes at {offset:,}, expected {expected:,}"
            )

    def _read(self, shard: _Shard, offset: int, data: np.ndarray) -> int:
        """Read bytes of a file at an offset into `data`; return how many came."""
        # O_DIRECT needs offset, length and memory at page boundaries: the OR of the three has no low bits then.
        direct = self._direct and (offset | data.nbytes | data.ctypes.data) % PAGE == 0
        # A file that took the name is another key, so a kept descriptor is never that of a replaced shard.
        key = shard.path, shard.version
        if direct == self._direct:
            file = self._files.get(key)
        else:
            file = None
        if file is not None:
            return os.preadv(file, [data.data], offset)
        file, direct = self._open_file(shard.path, direct)
        if direct == self._direct and len(self._files) < KEPT_FILES:
            kept = self._files.setdefault(key, file)
            if kept != file:  # another thread was faster
                os.close(file)
            return os.preadv(kept, [data.data], offset)
        try:
            return os.preadv(file, [data.data], offset)
        finally:
            os.close(file)

    def _open_file(self, path: str, direct: bool) -> tuple[int, bool]:
        """Open a file around the page cache, or through it where the file system allows nothing else."""
        flags = os.O_RDONLY | os.O_CLOEXEC
        if direct:
            try:
                return os.open(path, flags | os.O_DIRECT), True
            except OSError:
                self._direct = False
        return os.open(path, flags), False

    def _place(self, lead: int, sequence: int, position: int) -> tuple[int, int]:
        """Return the number of a row's chunk in its shard, and the row's place in the chunk."""
        per_lead, per_sequence, per_position = self._spec.chunk[:3]
        at = (
            lead % self._spec.shard[0] // per_lead,
            sequence % self._spec.shard[1] // per_sequence,
            position // per_position,
        )
        # Rows of a chunk lie by sequence, then by position.
        row = sequence % per_sequence * per_position + position % per_position
        return int(np.ravel_multi_index(at, self._spec.grid[:3])), row

    def _shard(self, lead: int, sequence: int) -> _Shard | None:
        """Return a row's shard as it is now, None where it was not made."""
        where = lead // self._spec.shard[0], sequence // self._spec.shard[1]
        # One stat a read: a repaired or replaced shard is noticed before its rows are mixed with old ones.
        known = self._shards.get(where)
        if known is not None:
            with suppress(FileNotFoundError):
                if version_of(os.stat(known.path)) == known.version:
                    return known
        shard = self._run.shard(self._spec, *where)
        if shard is None:
            return None
        name = self._spec.shard_path(*where)
        path = str(self._run.path / name)
        found = self._shards[where] = _Shard(name, path, shard.version, shard.index, shard.checks)
        return found


def _close(files: dict[tuple[str, Version | None], int]) -> None:
    for file in files.values():
        os.close(file)
