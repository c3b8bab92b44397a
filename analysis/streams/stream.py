"""Stream the vectors of runs in shuffled batches, for training sparse autoencoders: a torch IterableDataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from headwater.analysis.engine.pieces import cut_pieces, find_leads, order_pieces
from headwater.analysis.engine.scan import as_run
from headwater.analysis.engine.window import Filler, Window
from headwater.store.reader import Run

BUFFER_BYTES = 512 << 20
READERS = 4
Batch = Any


@dataclass(frozen=True)
class ShuffleQuality:
    """How well a stream mixes: two rows of one batch come from the same piece with `same_piece`, ideally `ideal`."""

    window_rows: int
    window_pieces: float
    same_piece: float
    ideal: float


def stream(
    runs: Run | str | Path | Sequence[Run | str | Path],
    site: str = "resid",
    batch_tokens: int = 4096,
    at: int | Sequence[int] | None = None,
    shuffle: bool = True,
    seed: int = 0,
    **options: Any,
) -> Stream:
    """Stream the vectors of one site of one or several runs; see `Stream`.

    `at` is a depth or layer, by default the middle one that the first run holds.
    """
    many = [runs] if isinstance(runs, Run | str | Path) else list(runs)
    return Stream([as_run(run) for run in many], site, batch_tokens, at, shuffle, seed, **options)


class Stream(IterableDataset[Batch]):
    """Batches [batch_tokens, …] of the vectors at all real positions of the committed sequences of runs.

    One `for` goes through `epochs` epochs; in each, every row comes exactly once, over all ranks and DataLoader
    workers together (the last batch of an epoch is shorter, or left out with `drop_last`; with `even` every reader
    hands out as many whole batches as the one that has fewest, so that ranks stay in step). `at` is a depth or layer,
    or several: then batches are [batch_tokens, len(at), …]. `without_first` leaves out each row's first visible
    position. With `index`, batches are (values, index): run, sequence, stored position of each row, int64 [n, 3].
    `dtype` converts; by default values are as stored. `threads` threads fill one window while another is handed out.
    `direct` reads around the page cache, which is faster where the disk is and nothing lies in the cache; by default
    where an epoch has more bytes than half of the free memory.

    Shuffling is in two steps: pieces of about 512 KB are permuted over all runs, and the rows of a window of pieces are
    permuted. Two windows take `buffer_bytes`. `quality` says how well that mixes. Without `shuffle`, rows come in the
    order of the runs.

    The order depends on `seed`, the epoch, the runs, `buffer_bytes` and the number of readers, and on nothing else.
    `state_dict` after a batch says where the next one begins; a stream that loads it goes on with the same batches.
    Rank and world size are torch.distributed's where that is initialised. Use it as `DataLoader(stream,
    batch_size=None)`; the state of DataLoader workers is theirs, so checkpoint without workers (windows are read ahead
    anyway) or with torchdata's StatefulDataLoader.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        site: str,
        batch_tokens: int,
        at: int | Sequence[int] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        *,
        epochs: int | None = 1,
        without_first: bool = False,
        index: bool = False,
        drop_last: bool = False,
        even: bool = False,
        dtype: torch.dtype | None = None,
        buffer_bytes: int = BUFFER_BYTES,
        threads: int = READERS,
        direct: bool | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        partial: bool = False,
    ) -> None:
        if not runs:
            raise ValueError("stream got no run; name at least one.")
        self._fingerprints = [run.manifest.fingerprint for run in runs]
        if at is None:
            stored = runs[0].leads(site)
            at = stored[len(stored) // 2]
        self.site = site
        self.at = at
        self.batch_tokens = batch_tokens
        leads = find_leads(runs, site, [at] if isinstance(at, int) else list(at))
        self.seed = seed if shuffle else None
        self.epochs = epochs
        self.epoch = 0
        self.index = index
        self.dtype = dtype
        self.drop_last = drop_last
        self.even = even
        self.without_first = without_first
        self.threads = threads
        least = {
            "batch_tokens": (batch_tokens, 1),
            "threads": (threads, 1),
            "epochs": (1 if epochs is None else epochs, 1),
            "seed": (seed, 0),
        }
        for name, (value, low) in least.items():
            if value < low:
                raise ValueError(f"{name} is {value}; expected a whole number from {low} on.")
        self.rank, self.world_size = _ranks(rank, world_size)
        self._filler = Filler(
            runs, site, leads, cut_pieces(runs, site, without_first, partial), index, direct
        )
        self.pieces, row_bytes = self._filler.pieces, self._filler.row_bytes
        self.window_rows = buffer_bytes // 2 // row_bytes
        if self.window_rows < batch_tokens:
            raise ValueError(
                f"buffer_bytes is {buffer_bytes:,}, which holds two windows of {self.window_rows:,} rows; expected "
                f"room for {batch_tokens:,} rows in each, {2 * batch_tokens * row_bytes:,} bytes."
            )
        self._state = _beginning(0)
        self._loaded = False

    @property
    def n_rows(self) -> int:
        """Rows of an epoch, over all ranks and workers."""
        return int(self.pieces.counts.sum())

    @property
    def quality(self) -> ShuffleQuality:
        """Say how well one reader's shuffle mixes; without shuffling, about how its order does."""
        counts = self.pieces.counts.astype(np.float64)
        n = counts.sum()
        pairs = (counts * (counts - 1)).sum()
        rows = (
            min(self.window_rows, int(n))
            if self.seed is not None
            else min(self.batch_tokens, int(n))
        )
        mean = pairs / n
        ideal = mean / max(n - 1, 1)
        return ShuffleQuality(
            rows, rows / float(counts.mean()), max(mean / max(rows - 1, 1), ideal), ideal
        )

    def set_epoch(self, epoch: int) -> None:
        """Begin with this epoch at the next `for`; needed where DataLoader workers make every epoch anew."""
        self.epoch, self._loaded, self._state = epoch, False, _beginning(epoch)

    def n_batches(self, epoch: int = 0, n_workers: int = 1) -> int:
        """Count the batches that this rank hands out in an epoch with that many DataLoader workers (0 counts as 1)."""
        n = max(n_workers, 1)
        shards = [(self.rank * n + worker, self.world_size * n) for worker in range(n)]
        return sum(self._n_batches(epoch, *shard) for shard in shards)

    def state_dict(self) -> dict[str, Any]:
        """Return where the next batch begins: epoch, window and row in it, and what the order depends on.

        `begun` is the epoch in which this `for` began, so that it ends where it would have ended.
        """
        return self._state | {"identity": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a state at the next `for`; raise ValueError where it is that of another stream."""
        own = self._identity()
        if differing := [name for name in own if own[name] != state.get("identity", {}).get(name)]:
            raise ValueError(
                f"the state is that of a stream with another {', '.join(differing)}; make this one with the same "
                "arguments and number of readers, or begin anew."
            )
        self._state = {name: int(state[name]) for name in self._state}
        self.epoch = self._state["epoch"]
        self._loaded = True

    def __iter__(self) -> Iterator[Batch]:
        if not self._loaded:
            self._state = _beginning(self.epoch)
        self._loaded = False
        begun, epoch, window, row = (
            self._state[name] for name in ("begun", "epoch", "window", "row")
        )
        buffers = [self._filler.make_buffer(self.window_rows) for _ in range(2)]
        with ThreadPoolExecutor(self.threads) as executor:
            while self.epochs is None or epoch < begun + self.epochs:
                yield from self._epoch(executor, buffers, epoch, window, row)
                self.epoch = epoch = epoch + 1
                window = row = 0
        self._state = _beginning(epoch)

    def _epoch(
        self,
        executor: ThreadPoolExecutor,
        buffers: list[np.ndarray],
        epoch: int,
        window: int,
        row: int,
    ) -> Iterator[Batch]:
        """Hand out the batches of an epoch from a row of a window on."""
        shard, n_shards = self._shard()
        windows = order_pieces(self.pieces, self.window_rows, self.seed, epoch, shard, n_shards)
        before = int(windows.rows[:window].sum()) + row
        left = self._n_batches(epoch, shard, n_shards) - before // self.batch_tokens

        def fill(at: int) -> Window | None:
            return self._filler.fill(
                executor, self.threads, windows, self.seed, epoch, at, buffers[at % 2]
            )

        ahead = fill(window)
        held: list[Batch] = []
        while left > 0 and ahead is not None:
            now = ahead
            window_now = window
            ahead = fill(window + 1)
            now.wait()
            while left > 0 and row < len(now):
                room = self.batch_tokens - sum(
                    len(part[0]) if self.index else len(part) for part in held
                )
                stop = min(row + room, len(now))
                held.append(self._part(now, row, stop))
                last = ahead is None and stop == len(now)
                row, room = stop, room - (stop - row)
                if room == 0 or last:
                    self._state |= {"epoch": epoch, "window": window_now, "row": row}
                    left -= 1
                    batch = _join(held)
                    held = []
                    yield batch
            window = window + 1
            row = 0

    def _part(self, window: Window, first: int, last: int) -> Batch:
        """Copy some rows out of a window, which is filled anew later, with their index where it is asked for."""
        rows, index = self._filler.take(window, first, last)
        values = torch.from_numpy(rows if isinstance(self.at, Sequence) else rows[:, 0])
        values = values if self.dtype is None else values.to(self.dtype)
        return (values, torch.from_numpy(index)) if self.index else values

    def _n_batches(self, epoch: int, shard: int, n_shards: int) -> int:
        """Count the batches of one reader in an epoch."""
        shards = range(n_shards) if self.even else [shard]
        rows = [
            int(
                order_pieces(
                    self.pieces, self.window_rows, self.seed, epoch, s, n_shards
                ).rows.sum()
            )
            for s in shards
        ]
        return (
            min(rows) // self.batch_tokens
            if self.even or self.drop_last
            else -(-rows[0] // self.batch_tokens)
        )

    def _shard(self) -> tuple[int, int]:
        """Return which reader of how many this is: ranks times DataLoader workers."""
        worker = get_worker_info()
        n = 1 if worker is None else worker.num_workers
        return self.rank * n + (0 if worker is None else worker.id), self.world_size * n

    def _identity(self) -> dict[str, Any]:
        at = self.at if isinstance(self.at, int) else list(self.at)
        return {
            "runs": self._fingerprints,
            "site": self.site,
            "at": at,
            "batch_tokens": self.batch_tokens,
            "seed": self.seed,
            "without_first": self.without_first,
            "buffer_bytes": self.window_rows,
            "rows": self.n_rows,
            "reader": list(self._shard()),
            "even": self.even,
            "drop_last": self.drop_last,
        }


def _join(parts: list[Batch]) -> Batch:
    """Join the parts of a batch that lies in several windows."""
    if len(parts) == 1:
        return parts[0]
    return (
        torch.cat(parts)
        if isinstance(parts[0], torch.Tensor)
        else tuple(map(torch.cat, zip(*parts, strict=True)))
    )


def _beginning(epoch: int) -> dict[str, int]:
    return {"begun": epoch, "epoch": epoch, "window": 0, "row": 0}


def _ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return rank and world size: those given, else torch.distributed's, else 0 of 1."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if rank is None and world_size is None and distributed:
        rank = torch.distributed.get_rank()
        world_size = torch.distributed.get_world_size()
    rank = rank or 0
    world_size = world_size or 1
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank is {rank} of world_size {world_size}; expected 0 to {world_size - 1}."
        )
    return rank, world_size
