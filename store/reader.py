"""Read a run: named slices, blocks, xarray. Uncompressed shards on disk are mapped into memory and not copied.

What is read is what was committed, or an error. A file that is written once is compared with the manifest whenever it
is read. A shard is compared with the ledger when it is first opened, and again after the file was replaced or written
to: its length, and its sum over the checksums of its chunks, so that no shard passes for another. Each chunk is
compared with its own checksum when a process first reads it.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd

from headwater.store.chunked import ChunkedArray, ChunkPlace
from headwater.store.layout import CODECS, ArraySpec
from headwater.store.ledger import Entry, Ledger
from headwater.store.manifest import Manifest, RunError, read_manifest
from headwater.store.place import PlaceLike, place_of
from headwater.store.plain import CompleteArray, SmallArray
from headwater.store.shard import CRC_BYTES, MISSING, checksum_of
from headwater.store.shard_file import ShardFile, open_shard, version_at

OPEN_SHARDS = 64
OPEN_ARRAYS = 64
KNOWN_ENTRIES = 64
FETCHES = 8


def open_run(path: PlaceLike, checked: bool = True, manifest: Manifest | None = None) -> Run:
    """Open a run for reading, whole or half done; raise RunError where there is none.

    Without `checked`, captured values are read as they lie on the disk, and damage to them is not noticed.
    `manifest` is the run's own where the caller has read it already.
    """
    return Run(path, checked, manifest)


class Run:
    """A run on disk or in an object store. `run["resid"][4, 0]` gives numpy values; `run.to_xarray()` a dataset.

    What was not captured yet reads as the array's fill value (NaN, −1); `run.complete` says which sequences are there.
    Values that are not those which were committed raise RunError, with the file and what to do; see the module.
    `"resid" in run`, `list(run)` and `len(run)` are about the captured arrays.
    """

    def __init__(
        self, path: PlaceLike, checked: bool = True, manifest: Manifest | None = None
    ) -> None:
        self.path = place_of(path)
        self.checked = checked
        self.manifest: Manifest = manifest or read_manifest(self.path)
        self.ledger = Ledger(self.path, self.manifest.fingerprint)
        self._specs = {spec.name: spec for spec in self.manifest.arrays}
        self._lock = threading.Lock()
        self._shards: OrderedDict[str, ShardFile] = OrderedDict()
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self.small = lru_cache(OPEN_ARRAYS)(self._open_small)
        self.coordinate = lru_cache(OPEN_ARRAYS)(self._read_coordinate)

    def __repr__(self) -> str:
        m = self.manifest
        return (
            f"<headwater.Run {self.path}: {m.n_sequences} sequences of {m.n_positions} positions, "
            f"{int(self.complete.sum())} complete, sites {', '.join(self.sites)}>"
        )

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the captured arrays."""
        return tuple(self._specs)

    @property
    def complete(self) -> np.ndarray:
        """bool [sequence]: whether a sequence is captured."""
        return self.plain("complete")

    @property
    def tokens(self) -> np.ndarray:
        """int32 [sequence, position]."""
        return self.plain("tokens")

    def plain(self, name: str) -> np.ndarray:
        """Read one of the small arrays whole: tokens, length, row_start, complete, labels, coordinates."""
        return self.rows(name)

    def rows(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """Read rows [first, last) of one of the small arrays."""
        return np.array(self.small(name)[first:last])

    def read_text(self, name: str) -> str | None:
        """Read a text file of the run, such as tokenizer.json; None where it has none."""
        if name in self.manifest.statics:
            return self.read_static(name).decode()
        return None

    def read_static(self, name: str) -> bytes:
        """Read a file that was written with the text; raise RunError where it is not what the manifest says."""
        try:
            data = (self.path / name).read_bytes()
        except FileNotFoundError:
            raise RunError(f"{self.path / name} is missing. {self._restore()}") from None
        expected = self.manifest.statics.get(name)
        if expected is not None and static_sum(name, data) != tuple(expected):
            raise RunError(
                f"{self.path / name} is not the file that was written with the run: it does not match its checksum. "
                f"{self._restore()}"
            )
        return data

    def _restore(self) -> str:
        return "Files that are written once cannot be computed again: restore it from a copy, or extract the run anew."

    def spec(self, name: str) -> ArraySpec:
        """Return the specification of a captured array; raise RunError with what there is."""
        if name not in self._specs:
            if name == "complete" or f"{name}/zarr.json" in self.manifest.statics:
                raise RunError(
                    f"{name!r} of {self.path} is a small array, which is read whole: run.plain({name!r})."
                )
            raise RunError(
                f"{self.path} has no {name!r}; it holds {', '.join(self._specs)}. Extract a run with --sites {name}."
            )
        return self._specs[name]

    def __getitem__(self, name: str) -> RunArray:
        return RunArray(self, self.spec(name))

    def leads(self, name: str) -> list[int]:
        """Return the layers (or depths) that an array holds, in order; [0] for an array without that dimension."""
        axis = self.spec(name).axis
        if axis is None:
            numbers = None
        else:
            numbers = self.coordinate(axis)
        if numbers is None:
            return [0]
        return [int(i) for i in numbers]

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """Yield (block, first, last) for every committed block."""
        for block in self.ledger.committed():
            yield (block, *self.manifest.block_range(block))

    def fetch_ahead(self, name: str, lead: int, first: int, last: int) -> None:
        """Ask the system to read the shards with sequences [first, last) at a lead, without waiting; on disk only."""
        here = self.path.local
        if here is None or not hasattr(os, "posix_fadvise"):
            return
        spec = self.spec(name)
        place = 0
        if spec.axis:
            place = lead // spec.layers_per_shard
        for group in range(first // spec.sequences_per_shard, -(-last // spec.sequences_per_shard)):
            try:
                file = os.open(
                    str(here / spec.shard_path(place, group)), os.O_RDONLY | os.O_CLOEXEC
                )
            except FileNotFoundError:
                continue
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)

    def to_xarray(self) -> Any:
        """Open the run as an xarray dataset; values are read when they are used."""
        import xarray

        return xarray.open_zarr(self.path.for_zarr(), chunks=None, zarr_format=3)

    def _open_small(self, name: str) -> ChunkedArray:
        """Open one of the small arrays."""
        if name == "complete":
            m = self.manifest
            return CompleteArray(m.n_sequences, m.block, self.ledger.holds)
        if f"{name}/zarr.json" not in self.manifest.statics:
            raise RunError(f"{self.path} has no array {name!r}.")
        return SmallArray(name, self.read_static)

    def _read_coordinate(self, dim: str) -> np.ndarray | None:
        """Read the model's numbers of a dimension's layers, depths or heads; None where none are stored."""
        if f"{dim}/zarr.json" not in self.manifest.statics:
            return None
        numbers = self.plain(dim)
        numbers.flags.writeable = False
        return numbers

    def shard(self, spec: ArraySpec, lead: int, group: int) -> ShardFile | None:
        """Return a shard by its number along the leading dimension and along the sequences; None where it was not made.

        It stays open; a file that was replaced or written to is opened anew. Raises RunError for a shard that is not
        the one which was committed.
        """
        path = spec.shard_path(lead, group)
        first = group * spec.sequences_per_shard
        try:
            shard = self._opened(path, int(np.prod(spec.grid)))
        except FileNotFoundError:
            block = first // self.manifest.block
            if self._entry(block, again=True) is not None:
                raise RunError(
                    f"{self.path / path} is missing, though block {block} is committed. {self._repair()}"
                ) from None
            return None
        if self.checked and (found := shard.sum()) is not None:
            block = first // self.manifest.block
            # The kept entry first: the ledger is asked again only where it disagrees with the file.
            for again in (False, True):  # a block that was computed again has a newer entry
                entry = self._entry(block, again)
                if entry is None or entry.files.get(path) == [*found]:
                    return shard
            raise RunError(
                f"{self.path / path} is not the file that was committed with block {block}: it was damaged "
                f"or replaced. {self._repair()}"
            )
        return shard

    def forget(self, path: str) -> None:
        """Close a shard: an object may have been replaced since its index was read."""
        with self._lock:
            self._shards.pop(path, None)

    def damaged(self, path: str, what: str) -> RunError:
        """Return the error for a shard that cannot be trusted."""
        return RunError(f"{self.path / path}: {what}. {self._repair()}")

    def _repair(self) -> str:
        return f"Run `headwater verify --repair {self.path}`, then extract again."

    def _opened(self, path: str, n_chunks: int) -> ShardFile:
        """Return a shard that is open, as long as it is the file of that name; raise FileNotFoundError without one."""
        # Asked before the lookup: of a file that is replaced in between, the older version is opened anew next time.
        there = version_at(self.path / path)
        with self._lock:
            shard = self._shards.get(path)
            if shard is not None and shard.version == there:
                self._shards.move_to_end(path)
                return shard
        try:
            shard = open_shard(self.path / path, n_chunks)
        except ValueError as error:
            if (self.path / path).size() == 0:
                what = "is empty"
            else:
                what = str(error)
            raise self.damaged(path, what) from error
        with self._lock:
            self._shards[path] = shard
            if len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)
        return shard

    def _entry(self, block: int, again: bool = False) -> Entry | None:
        """Return the ledger's entry of a block, None where it is not committed; `again` looks for a newer one."""
        with self._lock:
            if again:
                found = None
            else:
                found = self._entries.get(block)
        if found is None and (found := self.ledger.find(block)) is not None:
            with self._lock:
                self._entries[block] = found
                if len(self._entries) > KNOWN_ENTRIES:
                    self._entries.popitem(last=False)
        return found


def static_sum(name: str, data: bytes) -> tuple[int, int]:
    """Return length and sum of a file of stage 0; a chunk's sum is that of its values, which is also stored in it."""
    if "/c/" not in name:
        return len(data), int(google_crc32c.value(data))
    check = int(google_crc32c.value(data[:-CRC_BYTES]))
    stored = int.from_bytes(data[-CRC_BYTES:], "little")
    return len(data), check if check == stored else -1


class RunArray(ChunkedArray):
    """One captured array of a run: `shape`, `dims`, `dtype`, and indexing that returns numpy arrays.

    A selection inside one raw chunk is a read-only view of the file; anything else is copied. One dimension may be
    indexed by a list of integers or a mask, such as `run.complete`.
    """

    def __init__(self, run: Run, spec: ArraySpec) -> None:
        super().__init__(spec.name, spec.dims, spec.shape, spec.dtype, spec.chunk, spec.fill)
        self._run = run
        self.spec = spec

    def _read(self, places: Sequence[ChunkPlace]) -> Iterator[tuple[ChunkPlace, np.ndarray | None]]:
        """Yield chunks, None for those that are missing, shard by shard; objects are fetched side by side."""
        groups: dict[tuple[int, int], list[ChunkPlace]] = {}
        for place in places:
            groups.setdefault(self._shard_of(place), []).append(place)
        if self._run.path.remote is not None and len(groups) > 1:
            with ThreadPoolExecutor(FETCHES) as pool:
                for found in pool.map(self._read_shard, groups, groups.values()):
                    yield from found
        else:
            for shard, members in groups.items():
                yield from self._read_shard(shard, members)

    def _shard_of(self, place: ChunkPlace) -> tuple[int, int]:
        """Return which shard a chunk lies in: along the leading dimension, and along the sequences."""
        shard = [p // g for p, g in zip(place, self.spec.grid, strict=True)]
        if self.spec.axis:
            return (shard[0], shard[1])
        return (0, shard[0])

    def _read_shard(
        self, where: tuple[int, int], places: Sequence[ChunkPlace]
    ) -> list[tuple[ChunkPlace, np.ndarray | None]]:
        grid = self.spec.grid
        shard = self._run.shard(self.spec, *where)
        found: list[tuple[ChunkPlace, np.ndarray | None]] = [(place, None) for place in places]
        if shard is None:
            return found
        # A chunk's number in its shard is its place in the grid in C order.
        inside = [tuple(p % g for p, g in zip(place, grid, strict=True)) for place in places]
        numbers = [int(np.ravel_multi_index(i, grid)) for i in inside]
        spots = {
            i: (int(offset), int(n))
            for i, (offset, n) in enumerate(shard.index[numbers])
            if offset != MISSING
        }
        parts = []
        if spots:
            parts = shard.read(list(spots.values()))
        for i, part in zip(spots, parts, strict=True):
            # Once a process: the pages that were compared are the ones that are mapped.
            if self._run.checked and not shard.checks.chunks[numbers[i]]:
                self._check(part, where, inside[i])
                shard.checks.chunks[numbers[i]] = True
            found[i] = places[i], self._decode(part[:-CRC_BYTES])
        return found

    def _check(self, stored: np.ndarray, where: tuple[int, int], inside: ChunkPlace) -> None:
        if len(stored) < CRC_BYTES or chunk_is_damaged(stored):
            path = self.spec.shard_path(*where)
            self._run.forget(path)
            raise self._run.damaged(path, f"chunk {inside} does not match its checksum")

    def _decode(self, raw: np.ndarray) -> np.ndarray:
        if CODECS[self.spec.codec] is not None:
            raw = np.frombuffer(Zstd().decode(raw), np.uint8)
        return raw.view(self.dtype).reshape(self.spec.chunk)


def chunk_is_damaged(stored: np.ndarray) -> bool:
    """Say whether a chunk's bytes differ from the checksum that follows them."""
    return checksum_of(stored[:-CRC_BYTES]) != int.from_bytes(stored[-CRC_BYTES:], "little")
