"""Read rows of an array by plain reads: exactly the bytes that are asked for, with no map that pulls in more."""

from __future__ import annotations

import os

import numpy as np

from headwater.store.layout import CODECS
from headwater.store.manifest import RunError
from headwater.store.objects import ObjectPath
from headwater.store.reader import Run
from headwater.store.shard import MISSING


class RowReader:
    """Rows of an array with a leading dimension: positions of one sequence that lie inside one chunk.

    The indexes of shards that were read are kept: 16 bytes a chunk. Compressed chunks, objects and what is missing go
    the way of `RunArray`. Threads may share a reader.
    """

    def __init__(self, run: Run, name: str) -> None:
        self._run, self._array, self._spec = run, run[name], run.spec(name)
        self._plain = CODECS[self._spec.codec] is None and not isinstance(run.path, ObjectPath)
        self._row_bytes = int(np.prod(self._spec.chunk[3:])) * self._array.dtype.itemsize
        self._shards: dict[tuple[int, int], tuple[str, np.ndarray]] = {}

    def read(self, lead: int, sequence: int, first: int, last: int, out: np.ndarray) -> None:
        """Read positions [first, last) into `out`: contiguous, [last − first, width]."""
        path, offset = self._place(lead, sequence, first) if self._plain else ("", MISSING)
        if offset == MISSING:
            out[...] = self._array[lead, sequence, first:last].reshape(out.shape)
            return
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            n_read = os.preadv(file, [out.reshape(-1).view(np.uint8).data], offset)
        finally:
            os.close(file)
        if n_read != out.nbytes:
            raise RunError(
                f"{path} gave {n_read:,} bytes at {offset:,}, expected {out.nbytes:,}. Run `headwater verify --repair "
                f"{self._run.path}`, then extract again."
            )

    def _place(self, lead: int, sequence: int, position: int) -> tuple[str, int]:
        """Return a row's file and its offset there, MISSING where its chunk was not written."""
        spec = self._spec
        shard = lead // spec.shard[0], sequence // spec.shard[1]
        if shard not in self._shards:
            self._shards[shard] = self._open(shard)
        path, offsets = self._shards[shard]
        inside = lead % spec.shard[0], sequence % spec.shard[1], position
        at, row = zip(*map(divmod, inside, spec.chunk[:3]), strict=True)
        offset = int(offsets[at])
        return path, offset if offset == MISSING else offset + (row[1] * spec.chunk[2] + row[2]) * self._row_bytes

    def _open(self, shard: tuple[int, int]) -> tuple[str, np.ndarray]:
        """Return a shard's path and the offsets of its chunks, by lead, sequence and position."""
        grid, name = self._spec.grid[:3], self._spec.shard_path(*shard)
        try:
            index = self._run.open_shard(name, int(np.prod(grid))).index
        except FileNotFoundError:
            return "", np.full(grid, MISSING, np.uint64)
        return str(self._run.path / name), index[:, 0].reshape(grid)
