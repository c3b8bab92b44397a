"""Fill a window of a stream with the rows of some pieces, and take them out in a random order."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from headwater.analysis.engine.pieces import Pieces, Windows
from headwater.extractor.machine import available_memory
from headwater.store.reader import Run, open_run
from headwater.store.rows import RowReader
from headwater.store.shard import PAGE, page_buffer


class Spare:
    """Memory for batches, used again once nobody holds what was made of it: fresh pages cost as much as a copy."""

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = [page_buffer(0)]
        self._references = sys.getrefcount(self._kept[0])

    def take(self, n: int, row_bytes: int) -> np.ndarray:
        """Return room for n rows, one void element each."""
        size = n * row_bytes
        free = [
            at
            for at in range(len(self._kept))
            if sys.getrefcount(self._kept[at]) == self._references
        ]
        at = next((at for at in free if self._kept[at].nbytes >= size), None)
        if at is None:
            for old in reversed(free):
                del self._kept[old]
            self._kept.append(page_buffer(size))
            at = -1
        return self._kept[at][:size].view((np.void, row_bytes))


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

    def __init__(
        self,
        runs: Sequence[Run],
        site: str,
        leads: list[list[int]],
        pieces: Pieces,
        index: bool,
        direct: bool | None,
    ) -> None:
        self.site = site
        self.leads = leads
        self.pieces = pieces
        self.index = index
        self.shape, self.dtype = runs[0][site].shape[3:], runs[0][site].dtype
        self.n_lead = len(leads[0])
        self.vector_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        if direct is None:
            direct = int(pieces.counts.sum()) * self.row_bytes > available_memory() // 2
        self._readers: list[RowReader] | None = [RowReader(run, site, direct) for run in runs]
        self._paths = [(run.path, run.checked) for run in runs]
        self._direct = direct
        self._spare = Spare()

    @property
    def row_bytes(self) -> int:
        """Bytes of a row with all its leads."""
        return self.n_lead * self.vector_bytes

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": None, "_spare": Spare()}

    def make_buffer(self, window_rows: int) -> np.ndarray:
        """Make room for any window of `window_rows`: one void element for every row."""
        counts = self.pieces.counts
        n = min(window_rows + int(counts.max()), int(counts.sum()))
        return page_buffer(n * self.row_bytes)[: n * self.row_bytes].view((np.void, self.row_bytes))

    def fill(
        self,
        executor: Executor,
        n_parts: int,
        windows: Windows,
        seed: int | None,
        epoch: int,
        at: int,
        buffer: np.ndarray,
    ) -> Window | None:
        """Begin to fill a window, in a buffer of `make_buffer`, in `n_parts` tasks; return None behind the last."""
        if at >= len(windows.rows):
            return None
        mine = windows.pieces[windows.edges[at] : windows.edges[at + 1]]
        n = int(windows.rows[at])
        order = np.arange(n)
        if seed is not None:
            order[np.random.default_rng([seed, epoch, at, int(mine[0])]).permutation(n)] = (
                np.arange(n)
            )
        index = np.empty((n if self.index else 0, 3), np.int64)
        ends = np.cumsum(self.pieces.counts[mine])
        rows = buffer[:n].view(self.dtype).reshape(n, self.n_lead, -1)

        def copy(share: range) -> None:
            size = self.pieces.longest * self.vector_bytes
            scratch = page_buffer(size)[:size].view(self.dtype).reshape(self.pieces.longest, -1)
            for i in share:
                here = slice(int(ends[i - 1]) if i else 0, int(ends[i]))
                self._copy(int(mine[i]), rows[here], index[here], scratch)

        shares = [range(part, len(mine), n_parts) for part in range(min(n_parts, len(mine)))]
        return Window(buffer[:n], index, order, [executor.submit(copy, share) for share in shares])

    def take(self, window: Window, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Copy some rows out of a window in its order: values [n, lead, …] and index [n, 3]."""
        chosen = window.order[first:last]
        rows = self._spare.take(len(chosen), self.row_bytes)
        np.take(window.rows, chosen, out=rows, mode="clip")
        values = rows.view(self.dtype).reshape(len(chosen), self.n_lead, *self.shape)
        return values, window.index[chosen] if self.index else window.index

    def _copy(self, piece: int, rows: np.ndarray, index: np.ndarray, scratch: np.ndarray) -> None:
        """Copy the wanted rows of a piece to where they belong: rows [n, lead, width], index [n, 3]."""
        if self._readers is None:
            self._readers = [
                RowReader(open_run(*path), self.site, self._direct) for path in self._paths
            ]
        run, sequence, first, last = (int(x) for x in self.pieces.place[piece])
        whole = len(rows) == last - first
        keep = slice(None) if whole else self.pieces.rows(piece)
        read = self._readers[run].read
        if whole and self.n_lead == 1 and rows.ctypes.data % PAGE == 0:
            read(self.leads[run][0], sequence, first, last, rows[:, 0])
        else:
            part = scratch[: last - first]
            for i, lead in enumerate(self.leads[run]):
                read(lead, sequence, first, last, part)
                rows[:, i] = part[keep]
        if self.index:
            index[:, 0], index[:, 1] = run, sequence
            index[:, 2] = np.arange(first, last)[keep]
