"""Cut the vectors of several runs into pieces that are read together, and order them for an epoch.

A piece is a stretch of stored positions of one sequence inside one chunk, so reading it is one contiguous copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headwater.analysis.engine.reducer import Chunk
from headwater.analysis.engine.scan import committed_blocks
from headwater.store.manifest import RunError
from headwater.store.reader import Run

PIECE_BYTES = 512 << 10
POSITIONS = ("position", "selected_position")
ROWS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Pieces:
    """Pieces of runs: run, sequence, first and last position of each [n, 4], and how many of its rows are wanted [n].

    `keep` says for each run which positions are wanted, in bits [sequence, position / 8].
    """

    place: np.ndarray
    counts: np.ndarray
    keep: list[np.ndarray]

    @property
    def longest(self) -> int:
        """Positions of the longest piece."""
        return int((self.place[:, 3] - self.place[:, 2]).max())

    def rows(self, piece: int) -> np.ndarray:
        """Return which positions of a piece are wanted: bool [last − first]."""
        run, sequence, first, last = (int(x) for x in self.place[piece])
        bits = np.unpackbits(self.keep[run][sequence, first // 8 : -(-last // 8)])
        return bits[first % 8 : first % 8 + last - first].astype(bool)


@dataclass(frozen=True)
class Windows:
    """An epoch's pieces of one reader in order, cut into windows: window w holds pieces[edges[w] : edges[w + 1]]."""

    pieces: np.ndarray
    edges: np.ndarray
    rows: np.ndarray


def find_leads(runs: Sequence[Run], site: str, at: Sequence[int]) -> list[list[int]]:
    """Return the indices of layers or depths `at` in every run; raise RunError where the runs cannot be read as one."""
    leads = []
    for run in runs:
        spec = run.spec(site)
        first = runs[0].spec(site)
        if spec.axis is None or spec.dims[2] not in POSITIONS:
            raise RunError(
                f"{site} has the dimensions {spec.dims}; a stream takes vectors by position, such as resid."
            )
        if (spec.shape[3:], spec.dtype) != (first.shape[3:], first.dtype):
            raise RunError(
                f"{run.path} holds {site} as {spec.dtype} {list(spec.shape[3:])}, {runs[0].path} as {first.dtype} "
                f"{list(first.shape[3:])}. Stream runs of one model, stored alike."
            )
        stored = run.leads(site)
        if not at or (missing := sorted(set(at) - set(stored))):
            asked = missing if at else "nothing"
            raise RunError(
                f"{run.path} holds {site} at {spec.axis} {stored}; {asked} was asked for. Choose among these, or "
                "extract a run with more of them."
            )
        leads.append([stored.index(i) for i in at])
    return leads


def cut_pieces(runs: Sequence[Run], site: str, without_first: bool, partial: bool) -> Pieces:
    """Cut the committed sequences of runs into pieces of about PIECE_BYTES, without those that hold no wanted row."""
    places = []
    counts = []
    keep = []
    for i, run in enumerate(runs):
        kept = _kept(run, site, without_first, partial)
        n = kept.shape[1]
        step = _step(run, site)
        starts = np.arange(0, n, step)
        count = np.add.reduceat(kept.astype(np.int32), starts, 1)
        sequence, part = np.nonzero(count)
        first = starts[part]
        places.append(
            np.stack([np.full(len(first), i), sequence, first, np.minimum(first + step, n)], 1)
        )
        counts.append(count[sequence, part])
        keep.append(np.packbits(kept, axis=1))
    found = Pieces(np.concatenate(places), np.concatenate(counts).astype(np.int64), keep)
    if not len(found.counts):
        raise RunError(
            f"the committed sequences of {runs[0].path} hold no position to stream. Use without_first=False."
        )
    return found


def _kept(run: Run, site: str, without_first: bool, partial: bool) -> np.ndarray:
    """Say which stored positions are wanted: bool [sequence, position]."""
    kept = np.zeros((run.manifest.n_sequences, run[site].shape[2]), bool)
    for block in committed_blocks(run, partial):
        first, last = run.manifest.block_range(block)
        for low in range(first, last, step := max(ROWS_AT_ONCE // run.manifest.n_positions, 1)):
            high = min(low + step, last)
            row_start = run.rows("row_start", low, high)
            text = Chunk(run, low, high, row_start, row_start).text(site)
            kept[low:high] = text.real & ~text.first if without_first else text.real
    return kept


def _step(run: Run, site: str) -> int:
    """Return the positions of a piece: a chunk's, halved until they are within PIECE_BYTES, 16 at least."""
    spec = run.spec(site)
    row = int(np.prod(spec.shape[3:])) * np.dtype(spec.dtype).itemsize
    step = min(spec.chunk[2], spec.shape[2])
    while step * row > PIECE_BYTES and step >= 32 and step % 2 == 0:
        step //= 2
    return step


def order_pieces(
    pieces: Pieces,
    window_rows: int,
    seed: int | None,
    epoch: int,
    shard: int = 0,
    n_shards: int = 1,
) -> Windows:
    """Return the windows of one of `n_shards` readers for an epoch; all readers' together hold every piece once.

    Pieces are permuted by `seed` and `epoch` (None: in the order of the runs) and dealt out in turn. A window has
    `window_rows` rows, and at most a piece more.
    """
    n = len(pieces.counts)
    order = np.arange(n) if seed is None else np.random.default_rng([seed, epoch]).permutation(n)
    mine = order[shard::n_shards]
    total = np.cumsum(pieces.counts[mine])
    window = (total - pieces.counts[mine]) // window_rows
    edges = np.flatnonzero(np.diff(window, prepend=-1))
    rows = np.diff(np.concatenate([[0], total])[np.append(edges, len(mine))])
    return Windows(mine, np.append(edges, len(mine)), rows)
