"""Read rows of an array by plain reads: exactly the bytes that are asked for, with no map that pulls in more."""

from __future__ import annotations

import os
import weakref

import numpy as np

from headwater.store.layout import CODECS
from headwater.store.manifest import RunError
from headwater.store.objects import ObjectPath
from headwater.store.reader import Run
from headwater.store.shard import MISSING, PAGE

KEPT_FILES = 256


class RowReader:
    """Rows of an array with a leading dimension: positions of one sequence that lie inside one chunk.

    The indexes of shards that were read are kept: 16 bytes a chunk. Compressed chunks, objects and what is missing go
    the way of `RunArray`. Up to KEPT_FILES files are kept open. With `direct`, what lies on whole pages, in the file
    and in memory, is read around the page cache, where the file system allows it. Threads may share a reader.
    """

    def __init__(self, run: Run, name: str, direct: bool = False) -> None:
        self._direct = direct and hasattr(os, "O_DIRECT")
        self._run, self._array, self._spec = run, run[name], run.spec(name)
        self._plain = CODECS[self._spec.codec] is None and not isinstance(run.path, ObjectPath)
        self._row_bytes = int(np.prod(self._spec.chunk[3:])) * self._array.dtype.itemsize
        self._shards: dict[tuple[int, int], tuple[str, np.ndarray]] = {}
        self._files: dict[str, int] = {}
        weakref.finalize(self, _close, self._files)

    def read(self, lead: int, sequence: int, first: int, last: int, out: np.ndarray) -> None:
        """Read positions [first, last) into `out`: contiguous, [last − first, width]."""
        path, offset = self._place(lead, sequence, first) if self._plain else ("", MISSING)
        if offset == MISSING:
            out[...] = self._array[lead, sequence, first:last].reshape(out.shape)
            return
        n_read = self._read(path, offset, out.reshape(-1).view(np.uint8))
        if n_read != out.nbytes:
            raise RunError(
                f"{path} gave {n_read:,} bytes at {offset:,}, expected {out.nbytes:,}. Run `headwater verify --repair "
                f"{self._run.path}`, then extract again."
            )

    def _read(self, path: str, offset: int, data: np.ndarray) -> int:
        """Read bytes of a file at an offset into `data`; return how many came."""
        direct = self._direct and (offset | data.nbytes | data.ctypes.data) % PAGE == 0
        file = self._files.get(path) if direct == self._direct else None
        if file is not None:
            return os.preadv(file, [data.data], offset)
        file, direct = self._open_file(path, direct)
        if direct == self._direct and len(self._files) < KEPT_FILES:
            kept = self._files.setdefault(path, file)
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

    def _place(self, lead: int, sequence: int, position: int) -> tuple[str, int]:
        """Return a row's file and its offset there, MISSING where its chunk was not written."""
        per_lead, per_sequence, per_position = self._spec.chunk[:3]
        shard = lead // self._spec.shard[0], sequence // self._spec.shard[1]
        if shard not in self._shards:
            self._shards[shard] = self._open(shard)
        path, offsets = self._shards[shard]
        row = sequence % per_sequence * per_position + position % per_position
        at = (lead % self._spec.shard[0] // per_lead, sequence % self._spec.shard[1] // per_sequence,
              position // per_position)  # fmt: skip
        offset = int(offsets[at])
        return path, offset if offset == MISSING else offset + row * self._row_bytes

    def _open(self, shard: tuple[int, int]) -> tuple[str, np.ndarray]:
        """Return a shard's path and the offsets of its chunks, by lead, sequence and position."""
        grid, name = self._spec.grid[:3], self._spec.shard_path(*shard)
        try:
            index = self._run.open_shard(name, int(np.prod(grid))).index
        except FileNotFoundError:
            return "", np.full(grid, MISSING, np.uint64)
        return str(self._run.path / name), index[:, 0].reshape(grid)


def _close(files: dict[str, int]) -> None:
    for file in files.values():
        os.close(file)
