"""Read a run: named slices, blocks, xarray. Uncompressed shards on disk are mapped into memory and not copied."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd

from headwater.store.layout import CODECS, ArraySpec
from headwater.store.ledger import Ledger
from headwater.store.manifest import Manifest, RunError, read_manifest
from headwater.store.objects import ObjectPath
from headwater.store.place import Place, for_zarr, place_of, size_of
from headwater.store.shard import CRC_BYTES, MISSING, crc32c
from headwater.store.shard_file import ShardFile, open_shard

OPEN_SHARDS = 64
OPEN_ARRAYS = 64
FETCHES = 8
ChunkPlace = tuple[int, ...]


def open_run(path: str | os.PathLike[str] | ObjectPath) -> Run:
    """Open a run for reading, whole or half done; raise RunError where there is none."""
    return Run(place_of(path))


class Run:
    """A run on disk or in an object store. `run["resid"][4, 0]` gives numpy values; `run.to_xarray()` a dataset.

    What was not captured yet reads as the array's fill value (NaN, −1); `run.complete` says which sequences are there.
    On disk, raw values are read through memory maps, without their checksums: `headwater verify` checks those.
    """

    def __init__(self, path: Place) -> None:
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        self.ledger = Ledger(path, self.manifest.fingerprint)
        self._specs = {spec.name: spec for spec in self.manifest.arrays}
        self._shard = lru_cache(OPEN_SHARDS)(self.open_shard)
        self.small = lru_cache(OPEN_ARRAYS)(self._open_small)
        self.coordinate = lru_cache(OPEN_ARRAYS)(self._read_coordinate)

    def __repr__(self) -> str:
        m = self.manifest
        return (
            f"<headwater.Run {self.path}: {m.n_sequences} sequences of {m.n_positions} positions, "
            f"{int(self.complete.sum())} complete, sites {', '.join(self.sites)}>"
        )

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
        return np.asarray(self.small(name)[first:last])

    def read_text(self, name: str) -> str | None:
        """Read a text file of the run, such as tokenizer.json; None where it has none."""
        path = self.path / name
        return path.read_text() if path.is_file() else None

    def spec(self, name: str) -> ArraySpec:
        """Return the specification of a captured array; raise RunError with what there is."""
        if name not in self._specs:
            raise RunError(
                f"{self.path} has no {name!r}; it holds {', '.join(self._specs)}. Extract a run with --sites {name}."
            )
        return self._specs[name]

    def __getitem__(self, name: str) -> RunArray:
        return RunArray(self, self.spec(name))

    def leads(self, name: str) -> list[int]:
        """Return the layers (or depths) that an array holds, in order; [0] for an array without that dimension."""
        axis = self.spec(name).axis
        numbers = None if axis is None else self.coordinate(axis)
        return [0] if numbers is None else [int(i) for i in numbers]

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """Yield (block, first, last) for every committed block."""
        for block in self.ledger.committed():
            yield (block, *self.manifest.block_range(block))

    def fetch_ahead(self, name: str, lead: int, first: int, last: int) -> None:
        """Ask the system to read the shards with sequences [first, last) at a lead, without waiting; on disk only."""
        if isinstance(self.path, ObjectPath) or not hasattr(os, "posix_fadvise"):
            return
        spec = self.spec(name)
        place = lead // spec.layers_per_shard if spec.axis else 0
        for group in range(first // spec.sequences_per_shard, -(-last // spec.sequences_per_shard)):
            try:
                file = os.open(str(self.path / spec.shard_path(place, group)), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)

    def to_xarray(self) -> Any:
        """Open the run as an xarray dataset; values are read when they are used."""
        import xarray

        return xarray.open_zarr(for_zarr(self.path), chunks=None)

    def stream(self, site: str = "resid", batch_tokens: int = 4096, **options: Any) -> Any:
        """Stream a site's vectors in shuffled batches, as a torch IterableDataset; see `headwater.stream`."""
        import headwater

        return headwater.stream(self, site, batch_tokens, **options)

    def _open_small(self, name: str) -> Any:
        """Open one of the small arrays with zarr."""
        import zarr

        if not (self.path / name / "zarr.json").is_file():
            raise RunError(f"{self.path} has no array {name!r}.")
        return zarr.open_array(for_zarr(self.path / name), mode="r")

    def _read_coordinate(self, dim: str) -> np.ndarray | None:
        """Read the model's numbers of a dimension's layers, depths or heads; None where none are stored."""
        if f"{dim}/zarr.json" not in self.manifest.statics:
            return None
        numbers = self.plain(dim)
        numbers.flags.writeable = False
        return numbers

    def open_shard(self, path: str, n_chunks: int) -> ShardFile:
        """Open a shard with its index; raise FileNotFoundError without it."""
        try:
            return open_shard(self.path / path, n_chunks)
        except ValueError as error:
            what = "is empty" if size_of(self.path / path) == 0 else str(error)
            raise RunError(
                f"{self.path / path}: {what}. Run `headwater verify --repair {self.path}`, then extract again."
            ) from error


class RunArray:
    """One array of a run: `shape`, `dims`, `dtype`, and basic indexing that returns numpy arrays.

    A selection inside one raw chunk is a read-only view of the file; anything else is copied.
    """

    def __init__(self, run: Run, spec: ArraySpec) -> None:
        self._run = run
        self.spec = spec
        self.name, self.dims, self.shape = spec.name, spec.dims, spec.shape
        self.dtype = np.dtype(spec.dtype)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{d}: {n}" for d, n in zip(self.dims, self.shape, strict=True))
        return f"<headwater.RunArray {self.name} ({sizes}) {self.dtype}>"

    def __getitem__(self, key: Any) -> np.ndarray:
        ranges, dropped = self._ranges(key)
        chunks = [
            range(r.start // c, -(-r.stop // c)) if len(r) else range(0)
            for r, c in zip(ranges, self.spec.chunk, strict=True)
        ]
        places = [tuple(c[i] for c, i in zip(chunks, at, strict=True)) for at in np.ndindex(*map(len, chunks))]
        if len(places) == 1 and all(map(len, ranges)):
            ((place, data),) = self._read(places)
            inside = tuple(
                slice(r.start - p * c, r.stop - p * c) for r, p, c in zip(ranges, place, self.spec.chunk, strict=True)
            )
            out = np.full([len(r) for r in ranges], self.spec.fill, self.dtype) if data is None else data[inside]
        else:
            out = np.full([len(r) for r in ranges], self.spec.fill, self.dtype)
            for place, data in self._read(places):
                if data is not None:
                    self._copy(place, data, ranges, out)
        return out[tuple(0 if d else slice(None) for d in dropped)]

    def _copy(self, place: ChunkPlace, data: np.ndarray, ranges: list[range], out: np.ndarray) -> None:
        source, target = [], []
        for p, c, r in zip(place, self.spec.chunk, ranges, strict=True):
            low, high = max(r.start, p * c), min(r.stop, (p + 1) * c)
            source.append(slice(low - p * c, high - p * c))
            target.append(slice(low - r.start, high - r.start))
        out[tuple(target)] = data[tuple(source)]

    def _read(self, places: Sequence[ChunkPlace]) -> Iterator[tuple[ChunkPlace, np.ndarray | None]]:
        """Yield chunks, None for those that are missing, shard by shard; objects are fetched side by side."""
        groups: dict[str, list[ChunkPlace]] = {}
        for place in places:
            groups.setdefault(self._shard_of(place), []).append(place)
        if isinstance(self._run.path, ObjectPath) and len(groups) > 1:
            with ThreadPoolExecutor(FETCHES) as pool:
                for found in pool.map(self._read_shard, groups, groups.values()):
                    yield from found
        else:
            for path, members in groups.items():
                yield from self._read_shard(path, members)

    def _shard_of(self, place: ChunkPlace) -> str:
        shard = [p // g for p, g in zip(place, self.spec.grid, strict=True)]
        return self.spec.shard_path(shard[0], shard[1]) if self.spec.axis else self.spec.shard_path(0, shard[0])

    def _read_shard(self, path: str, places: Sequence[ChunkPlace]) -> list[tuple[ChunkPlace, np.ndarray | None]]:
        grid = self.spec.grid
        try:
            shard = self._run._shard(path, int(np.prod(grid)))
        except FileNotFoundError:
            return [(place, None) for place in places]
        inside = [tuple(p % g for p, g in zip(place, grid, strict=True)) for place in places]
        spots = [shard.index[np.ravel_multi_index(i, grid)] for i in inside]
        there = [i for i, spot in enumerate(spots) if int(spot[0]) != MISSING]
        parts = shard.read([(int(spots[i][0]), int(spots[i][1])) for i in there]) if there else []
        found: list[tuple[ChunkPlace, np.ndarray | None]] = [(place, None) for place in places]
        for i, part in zip(there, parts, strict=True):
            found[i] = places[i], self._decode(part, shard.checked, f"{self._run.path / path}: chunk {inside[i]}")
        return found

    def _decode(self, stored: np.ndarray, checked: bool, what: str) -> np.ndarray:
        spec, raw = self.spec, stored[:-CRC_BYTES]
        packed = CODECS[spec.codec] is not None
        if (packed or not checked) and crc32c(raw) != stored[-CRC_BYTES:].tobytes():
            raise RunError(
                f"{what} does not match its checksum. Run `headwater verify --repair {self._run.path}`, then extract "
                "again."
            )
        if packed:
            raw = np.frombuffer(Zstd().decode(raw), np.uint8)
        return raw.view(self.dtype).reshape(spec.chunk)

    def _ranges(self, key: Any) -> tuple[list[range], list[bool]]:
        parts = list(key) if isinstance(key, tuple) else [key]
        if Ellipsis in parts:
            at = parts.index(Ellipsis)
            parts[at : at + 1] = [slice(None)] * (len(self.shape) - len(parts) + 1)
        parts += [slice(None)] * (len(self.shape) - len(parts))
        if len(parts) > len(self.shape):
            raise IndexError(f"{self.name} has {len(self.shape)} dimensions {self.dims}; got {len(parts)} indices")
        ranges, dropped = [], []
        for part, size, dim in zip(parts, self.shape, self.dims, strict=True):
            if isinstance(part, slice):
                chosen = range(size)[part]
                if chosen.step != 1:
                    raise IndexError(
                        f"{self.name}: step {chosen.step} along {dim}; only whole ranges can be read, "
                        "take every n-th value of the result"
                    )
                ranges.append(chosen)
            else:
                index = int(part)
                if not -size <= index < size:
                    raise IndexError(f"{self.name}: index {index} is out of range along {dim}, which has {size}")
                ranges.append(range(index % size, index % size + 1))
            dropped.append(not isinstance(part, slice))
        return ranges, dropped
