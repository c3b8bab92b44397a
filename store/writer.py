"""Write the shards of one block: values come in layer by layer, each shard closes as its layers end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from headwater.store.files import (
    GONE,
    RunMoved,
    make_directories,
    sync_directory,
    unique_name,
    write_temporary,
)
from headwater.store.layout import CODECS, ArraySpec
from headwater.store.ring import Lanes, Ring, Slab
from headwater.store.shard import ShardWriter, crc32c, round_up

RING_DEPTH = 3
INTERNAL = "headwater"


class Part(NamedTuple):
    """Where to put values: `view` takes source[sequences, positions]."""

    view: np.ndarray
    sequences: slice
    positions: slice


@dataclass
class FileSum:
    """Length in bytes and sum of one file of a block: of a shard see `shard_sum`, of a chunk its CRC32C."""

    n_bytes: int
    crc32c: int


@dataclass
class _Open:
    """A slab that is being filled: all chunks of one leading index and one group of sequences (or one row of tiles)."""

    slab: Slab
    chunks: np.ndarray
    indices: Sequence[tuple[int, ...]]
    shard: tuple[int, int]
    last: int


@dataclass
class _Array:
    spec: ArraySpec
    ring: Ring
    place: int
    shards: dict[tuple[int, int], ShardWriter] = field(default_factory=dict)
    open: _Open | None = None
    key: tuple[int, ...] = ()


class BlockWriter:
    """Take the values of one block after another and make their shards; used by one thread.

    `block` is the number of sequences of a whole block. `begin`, then `parts` or `tile_row` for every value,
    `close_layer` as layers end, `finish` at the end. With a `sink`, `run` holds only temporary files, and the sink is
    given each finished one with its path in the run, and takes it away.
    """

    def __init__(
        self,
        run: Path,
        specs: Sequence[ArraySpec],
        block: int,
        n_threads: int = 1,
        direct: bool = True,
        sink: Callable[[Path, str], None] | None = None,
    ) -> None:
        self.run = run
        self._sink = sink
        self.block = block
        self.direct = direct
        self._arrays = {
            s.name: _Array(s, Ring(RING_DEPTH, chunks_per_slab(s), s.chunk_bytes), i)
            for i, s in enumerate(specs)
        }
        self._lanes = Lanes(n_threads)
        self._files: dict[str, FileSum] = {}
        self._directories: set[Path] = set()
        self._named: set[Path] = set()
        self._live: set[ShardWriter] = set()
        self.seconds: dict[str, float] = {}

    def begin(self, first: int, last: int, label: str) -> None:
        """Start the block of sequences [first, last); `label` begins the names of its temporary files."""
        self._first = first
        self._last = last
        self._label = unique_name(label)
        # A block counts only what it wrote itself; directories are those that got a new name and wait for a fsync.
        self._files, self._directories = {}, set()
        self.seconds = {"write": 0.0, "sync": 0.0, "wait": 0.0}
        self._waited = self._total_waited()
        self._lanes.reset()
        self._check_there()
        make_directories(self.run / INTERNAL / "tmp")

    def _check_there(self) -> None:
        """Raise RunMoved rather than make the folder of a run anew that was moved or deleted meanwhile."""
        if self._sink is None and not self.run.is_dir():
            raise RunMoved(f"{self.run} is gone: {GONE}")

    def parts(self, name: str, lead: int, first: int, n: int) -> Iterator[Part]:
        """Yield the places for sequences [first, first + n) of the run at leading index `lead`.

        The caller fills each view, of shape [sequences, positions, …] (or [sequences, …] where the second dimension is
        not the position), before it asks for the next.
        """
        array = self._arrays[name]
        spec = self._arrays[name].spec
        per = spec.sequences_per_chunk
        lead_dims = spec.sequence_dim
        step = spec.chunk[lead_dims + 1]
        extent = spec.shape[lead_dims + 1]
        done = first
        while done < first + n:
            # Chunks hold whole groups of `per` sequences; the block's last group may be a part of one.
            group = done // per * per
            stop = min(group + per, first + n)
            opened = self._slab(
                array, (lead, group), partial(self._vector_chunks, spec, lead, group)
            )
            for i, start in enumerate(range(0, extent, step)):
                rows = min(step, extent - start)
                view = opened.chunks[i].reshape(spec.chunk[lead_dims:])[
                    done - group : stop - group, :rows
                ]
                yield Part(view, slice(done - first, stop - first), slice(start, start + rows))
            done = stop
            # The group is whole: its slab goes to the disk, and the next group takes another.
            if stop == opened.last:
                self._send(array)

    def tile_row(self, name: str, lead: int, sequence: int, row: int) -> np.ndarray:
        """Return the tiles of one row of tiles, [key tile, head group, heads, query, key], to fill; ask again to go on.

        The tiles go to the disk at `send_tiles`.
        """
        array = self._arrays[name]
        opened = self._slab(
            array,
            (lead, sequence, row),
            partial(self._tile_chunks, array.spec, lead, sequence, row),
        )
        groups = array.spec.grid[2]
        return opened.chunks.reshape(row + 1, groups, *array.spec.chunk[2:])

    def send_tiles(self, name: str) -> None:
        """Hand the row of tiles that was filled last to the writer threads."""
        self._send(self._arrays[name])

    def close_layer(self, axis: str, lead: int) -> None:
        """Commit the shards that hold only this layer (or depth)."""
        for array in self._arrays.values():
            if array.spec.axis == axis and array.spec.layers_per_shard == 1:
                self._commit(array, lead)

    def finish(self) -> dict[str, FileSum]:
        """Commit what is open, wait for the disk, mark the sequences complete; return the files with their sums."""
        for array in self._arrays.values():
            self._commit(array, None)
        # Every shard is fsynced and renamed once the lanes are empty. Only then may `complete` say so, and only
        # then may the caller create the ledger's entry, which commits the block.
        self._lanes.join()
        # `complete` is for readers without the ledger; its own name is made durable below.
        self._mark_complete()
        start = time.perf_counter()
        for directory in sorted(self._directories):
            sync_directory(directory)
        self.seconds["sync"] += time.perf_counter() - start
        self.seconds["wait"] = self._total_waited() - self._waited
        return dict(sorted(self._files.items()))

    def abandon(self) -> None:
        """Drop a block that failed, with its temporary files."""
        try:
            self._lanes.join()
        except BaseException:
            self._lanes.reset()
        for array in self._arrays.values():
            if array.open is not None:
                array.ring.give(array.open.slab)
                array.open = None
            array.shards.clear()
        for shard in self._live:
            shard.discard()
        self._live.clear()
        self._named.clear()

    def close(self) -> None:
        """End the writer threads."""
        self._lanes.close()

    def _slab(self, array: _Array, key: tuple[int, ...], make: Any) -> _Open:
        if array.open is None or array.key != key:
            if array.open is not None:
                raise RuntimeError(
                    f"{array.spec.name}: {key} was begun before {array.key} was whole"
                )
            self._lanes.check()
            slab = array.ring.take(self._lanes.check)
            array.open = make(slab)
            array.key = key
        return array.open

    def _vector_chunks(self, spec: ArraySpec, lead: int, group: int, slab: Slab) -> _Open:
        per = spec.sequences_per_chunk
        lead_dims = spec.sequence_dim
        # A chunk's place: which shard, then which chunk inside of it along every dimension of the grid.
        shard = (lead // spec.layers_per_shard, group // spec.sequences_per_shard)
        inside = ((lead % spec.layers_per_shard,) if lead_dims else ()) + (
            group % spec.sequences_per_shard // per,
        )
        indices = [(*inside, *rest) for rest in np.ndindex(*spec.grid[lead_dims + 1 :])]
        chunks = slab.chunks(spec.dtype, spec.chunk)
        last = min(group + per, self._last)
        # Memory of a slab is reused: what the values will not cover (a short group, padding behind the array's
        # end) must hold the fill value, not what lay there before.
        if last < group + per or spec.shard[lead_dims + 1] != spec.shape[lead_dims + 1]:
            chunks[:] = spec.fill
        return _Open(slab, chunks, indices, shard, last)

    def _tile_chunks(
        self, spec: ArraySpec, lead: int, sequence: int, row: int, slab: Slab
    ) -> _Open:
        shard = (lead // spec.layers_per_shard, sequence // spec.sequences_per_shard)
        inside = (lead % spec.layers_per_shard, sequence % spec.sequences_per_shard)
        indices = [(*inside, g, row, j) for j in range(row + 1) for g in range(spec.grid[2])]
        chunks = slab.chunks(spec.dtype, spec.chunk)[: len(indices)]
        # The last tiles reach beyond T; the others are written whole by the forward pass.
        if (row + 1) * spec.chunk[-1] > spec.shape[-1]:
            chunks[:] = spec.fill
        return _Open(slab, chunks, indices, shard, 0)

    def _send(self, array: _Array) -> None:
        opened = array.open
        if opened is None:
            return
        writer = array.shards.get(opened.shard)
        # A shard's file is made when its first chunk is there: under a temporary name, so that a crash leaves
        # nothing that could be taken for a shard.
        if writer is None:
            spec = array.spec
            path = (
                self.run
                / INTERNAL
                / "tmp"
                / f"{self._label}-{spec.name}-{opened.shard[0]}-{opened.shard[1]}"
            )
            writer = ShardWriter(path, spec.grid, CODECS[spec.codec], self.direct)
            array.shards[opened.shard] = writer
            self._live.add(writer)
        array.open = None
        pages = opened.slab.pages[: len(opened.indices)]

        # The thread that owns the shard writes it while the forward pass fills the next slab; the slab comes back
        # to the ring afterwards, whatever happened.
        def write() -> None:
            start = time.perf_counter()
            writer.put_pages(opened.indices, pages, opened.slab.chunk_bytes)
            self.seconds["write"] += time.perf_counter() - start

        # One shard always goes to one thread, so its chunks keep their order and need no lock; arrays and shards
        # are spread over the threads by their number.
        self._lanes.submit(
            array.place + sum(opened.shard), write, partial(array.ring.give, opened.slab)
        )

    def _commit(self, array: _Array, lead: int | None) -> None:
        for shard in [s for s in array.shards if lead is None or s[0] == lead]:
            writer = array.shards.pop(shard)
            path = array.spec.shard_path(*shard)
            self._lanes.submit(array.place + sum(shard), partial(self._publish, writer, path))

    def _publish(self, writer: ShardWriter, path: str) -> None:
        start = time.perf_counter()
        # `commit` fsyncs the bytes before the rename below gives them their final name.
        self._files[path] = FileSum(*writer.commit())
        self._rename(writer.path, path)
        self._live.discard(writer)
        self.seconds["sync"] += time.perf_counter() - start

    def _rename(self, temporary: Path, path: str) -> None:
        if self._sink is not None:
            self._sink(temporary, path)
            return
        self._check_there()
        final = self.run / path
        make_directories(final.parent)
        # An older attempt's file of this name is replaced whole. Its directory is fsynced in `finish`, once for all
        # shards, not once a shard.
        os.replace(temporary, final)
        self._directories.add(final.parent)
        # A folder that is new has its own name in its parent: that must be durable, too.
        for folder in final.relative_to(self.run).parents[:-1]:
            if folder not in self._named:
                self._named.add(folder)
                self._directories.add((self.run / folder).parent)

    def _mark_complete(self) -> None:
        """Write the block's chunk of `complete`, after the shards' names are durable."""
        for directory in sorted(self._directories):
            sync_directory(directory)
        self._directories.clear()
        # A chunk of `complete` is a block. The last block may be shorter; what lies beyond it stays False.
        data = np.zeros(self.block, bool)
        data[: self._last - self._first] = True
        check = crc32c(data.view(np.uint8))
        raw = data.tobytes() + check
        temporary = self.run / INTERNAL / "tmp" / f"{self._label}-complete"
        write_temporary(temporary, raw)
        path = f"complete/c/{self._first // self.block}"
        self._files[path] = FileSum(len(raw), int.from_bytes(check, "little"))
        self._rename(temporary, path)

    def _total_waited(self) -> float:
        return sum(a.ring.waited for a in self._arrays.values())


def chunks_per_slab(spec: ArraySpec) -> int:
    """Chunks that one slab of an array holds: a whole row of tiles, or every chunk of one group of sequences."""
    lead = spec.sequence_dim
    if spec.tiled:
        return spec.grid[2] * spec.grid[-1]
    return int(np.prod(spec.grid[lead + 1 :]))


def ring_bytes(specs: Sequence[ArraySpec]) -> int:
    """Bytes of all slabs of a BlockWriter."""
    return sum(RING_DEPTH * chunks_per_slab(s) * round_up(s.chunk_bytes + 4) for s in specs)


def file_sums(files: Mapping[str, FileSum]) -> dict[str, list[int]]:
    """Return path → [bytes, sum], as the ledger stores it."""
    return {path: [f.n_bytes, f.crc32c] for path, f in files.items()}
