"""Fill a window of a stream with the rows of some pieces, and take them out in a random order."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from headwater.analysis.pieces import Pieces, Windows
from headwater.store.reader import Run, open_run
from headwater.store.rows import RowReader


@dataclass
class Window:
    """Rows as they were read, one void element each; where they came from, [n, 3]; the order to hand them out in."""

    rows: np.ndarray
    index: np.ndarray
    order: np.ndarray
    parts: list[Future[None]]

    def __len__(self) -> int:
        return len(self.order)

    def wait(self) -> None:
        """Wait until every row is there; raise what went wrong."""
        for part in self.parts:
            part.result()


class Filler:
    """Copy the pieces of windows out of runs; travels to other processes as the runs' paths."""

    def __init__(self, runs: Sequence[Run], site: str, leads: list[list[int]], pieces: Pieces, index: bool) -> None:
        self._readers: list[RowReader] | None = [RowReader(run, site) for run in runs]
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
        return self.__dict__ | {"_readers": None}

    def make_buffer(self, window_rows: int) -> np.ndarray:
        """Make room for any window of `window_rows`: one void element for every row."""
        counts = self.pieces.counts
        n = min(window_rows + int(counts.max()), int(counts.sum()))
        return np.empty(n, np.dtype((np.void, self.row_bytes)))

    def fill(
        self, executor: Executor, n_parts: int, windows: Windows, seed: int | None, epoch: int, at: int,
        buffer: np.ndarray,
    ) -> Window | None:  # fmt: skip
        """Begin to fill a window, in a buffer of `make_buffer`, in `n_parts` tasks; return None behind the last."""
        if at >= len(windows.rows):
            return None
        mine, n = windows.pieces[windows.edges[at] : windows.edges[at + 1]], int(windows.rows[at])
        order = np.arange(n)
        if seed is not None:
            order[np.random.default_rng([seed, epoch, at, int(mine[0])]).permutation(n)] = np.arange(n)
        index = np.empty((n if self.index else 0, 3), np.int64)
        ends = np.cumsum(self.pieces.counts[mine])
        rows = buffer[:n].view(self.dtype).reshape(n, self.n_lead, -1)

        def copy(share: range) -> None:
            scratch = np.empty((self.pieces.longest, rows.shape[2]), self.dtype)
            for i in share:
                here = slice(int(ends[i - 1]) if i else 0, int(ends[i]))
                self._copy(int(mine[i]), rows[here], index[here], scratch)

        shares = [range(part, len(mine), n_parts) for part in range(min(n_parts, len(mine)))]
        return Window(buffer[:n], index, order, [executor.submit(copy, share) for share in shares])

    def take(self, window: Window, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Copy some rows out of a window in its order: values [n, lead, …] and index [n, 3]."""
        chosen = window.order[first:last]
        values = window.rows[chosen].view(self.dtype).reshape(len(chosen), self.n_lead, *self.shape)
        return values, window.index[chosen] if self.index else window.index

    def _copy(self, piece: int, rows: np.ndarray, index: np.ndarray, scratch: np.ndarray) -> None:
        """Copy the wanted rows of a piece to where they belong: rows [n, lead, width], index [n, 3]."""
        if self._readers is None:
            self._readers = [RowReader(open_run(path), self.site) for path in self._paths]
        run, sequence, first, last = (int(x) for x in self.pieces.place[piece])
        whole = len(rows) == last - first
        keep = slice(None) if whole else self.pieces.rows(piece)
        read = self._readers[run].read
        if whole and self.n_lead == 1:
            read(self.leads[run][0], sequence, first, last, rows[:, 0])
        else:
            part = scratch[: last - first]
            for i, lead in enumerate(self.leads[run]):
                read(lead, sequence, first, last, part)
                rows[:, i] = part[keep]
        if self.index:
            index[:, 0], index[:, 1] = run, sequence
            index[:, 2] = np.arange(first, last)[keep]
