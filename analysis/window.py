"""Fill a window of a stream: the rows of some pieces, each in its slot of a random order."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from headwater.analysis.pieces import Pieces, Windows
from headwater.store.reader import Run, open_run


@dataclass
class Window:
    """Rows [n, lead, …] in the order in which they are handed out, and run, sequence, position of each [n, 3]."""

    values: np.ndarray
    index: np.ndarray
    parts: list[Future[None]]

    def wait(self) -> None:
        """Wait until every row is in its place; raise what went wrong."""
        for part in self.parts:
            part.result()


class Filler:
    """Copy the pieces of windows out of runs; travels to other processes as the runs' paths."""

    def __init__(self, runs: Sequence[Run], site: str, leads: list[list[int]], pieces: Pieces, index: bool) -> None:
        self._runs: list[Run] | None = list(runs)
        self._paths = [run.path for run in runs]
        self.site, self.leads, self.pieces, self.index = site, leads, pieces, index
        self.shape, self.dtype = runs[0][site].shape[3:], runs[0][site].dtype
        self.n_lead = len(leads[0])
        self.vector_bytes = int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of a row with all its leads."""
        return self.n_lead * self.vector_bytes

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_runs": None}

    def make_buffer(self, window_rows: int) -> np.ndarray:
        """Make room for any window of `window_rows`: one void element for every vector, [rows · lead].

        Its pages are touched in order: in random order they would come some ten times slower.
        """
        counts = self.pieces.counts
        n = min(window_rows + int(counts.max()), int(counts.sum()))
        buffer = np.empty(n * self.n_lead, np.dtype((np.void, self.vector_bytes)))
        buffer.view(np.uint8).fill(0)
        return buffer

    def fill(
        self, executor: Executor, n_parts: int, windows: Windows, seed: int | None, epoch: int, at: int,
        buffer: np.ndarray,
    ) -> Window | None:  # fmt: skip
        """Begin to fill a window, in a buffer of `make_buffer`, in `n_parts` tasks; return None behind the last."""
        if at >= len(windows.rows):
            return None
        mine, n = windows.pieces[windows.edges[at] : windows.edges[at + 1]], int(windows.rows[at])
        slots = np.arange(n)
        if seed is not None:
            slots = np.random.default_rng([seed, epoch, at, int(mine[0])]).permutation(n)
        target = buffer[: n * self.n_lead]
        index = np.empty((n if self.index else 0, 3), np.int64)
        slot = np.split(slots, np.cumsum(self.pieces.counts[mine])[:-1])
        shares = [share for share in np.array_split(np.arange(len(mine)), n_parts) if len(share)]

        def copy(share: np.ndarray) -> None:
            for i in share:
                self._copy(int(mine[i]), slot[i], target, index)

        values = target.view(self.dtype).reshape(n, self.n_lead, *self.shape)
        return Window(values, index, [executor.submit(copy, share) for share in shares])

    def _copy(self, piece: int, slot: np.ndarray, target: np.ndarray, index: np.ndarray) -> None:
        """Copy the wanted rows of a piece to their slots."""
        if self._runs is None:
            self._runs = [open_run(path) for path in self._paths]
        run, sequence, first, last = (int(x) for x in self.pieces.place[piece])
        keep = slice(None) if len(slot) == last - first else self.pieces.rows(piece)
        array = self._runs[run][self.site]
        for i, lead in enumerate(self.leads[run]):
            rows = np.ascontiguousarray(array[lead, sequence, first:last]).reshape(last - first, -1)
            target[slot * self.n_lead + i] = rows.view(target.dtype)[:, 0][keep]
        if self.index:
            index[slot, 0], index[slot, 1] = run, sequence
            index[slot, 2] = np.arange(first, last)[keep]
