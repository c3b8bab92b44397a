"""Indexing of arrays that lie in chunks: which chunks a selection needs, and how it is put together."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

ChunkPlace = tuple[int, ...]
Part = range | np.ndarray


class ChunkedArray(ABC):
    """An array in chunks: `name`, `dims`, `shape`, `dtype`, and indexing that returns numpy arrays.

    An index is an integer or a whole range (slice) for each dimension; along one of them it may be a list of integers
    or a mask. Dimensions keep their order, whatever they are indexed with.
    """

    def __init__(
        self,
        name: str,
        dims: tuple[str, ...],
        shape: tuple[int, ...],
        dtype: str,
        chunk: tuple[int, ...],
        fill: float,
    ) -> None:
        self.name = name
        self.dims = dims
        self.shape = shape
        self.fill = fill
        self.dtype = np.dtype(dtype)
        self._chunk = chunk

    def __repr__(self) -> str:
        sizes = ", ".join(f"{d}: {n}" for d, n in zip(self.dims, self.shape, strict=True))
        return f"<headwater.{type(self).__name__} {self.name} ({sizes}) {self.dtype}>"

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read everything, for `np.asarray`."""
        if copy is False:
            raise ValueError(
                f"{self.name} lies in chunks of files: it cannot be had without a copy."
            )
        return self[...].astype(dtype or self.dtype, copy=False)

    def __getitem__(self, key: Any) -> np.ndarray:
        parts, dropped = self._parts(key)
        listed = [axis for axis, part in enumerate(parts) if isinstance(part, np.ndarray)]
        if len(listed) > 1:
            names = " and ".join(self.dims[axis] for axis in listed)
            raise IndexError(
                f"{self.name}: lists or masks along {names}; one dimension at a time can be indexed so. Index the "
                "values that are read along the other."
            )
        if listed:
            values = self._take(parts, listed[0])
        else:
            values = self._basic(_ranges(parts))
        return values[tuple(0 if d else slice(None) for d in dropped)]

    @abstractmethod
    def _read(self, places: Sequence[ChunkPlace]) -> Iterable[tuple[ChunkPlace, np.ndarray | None]]:
        """Yield the chunks at places of the grid, None for those that were never written."""

    def _basic(self, ranges: list[range]) -> np.ndarray:
        """Return whole ranges: a view where they lie inside one chunk, else a copy."""
        chunks = [
            range(r.start // c, -(-r.stop // c)) if len(r) else range(0)
            for r, c in zip(ranges, self._chunk, strict=True)
        ]
        places = [
            tuple(c[i] for c, i in zip(chunks, at, strict=True))
            for at in np.ndindex(*map(len, chunks))
        ]
        # Inside one chunk no copy is needed: a view of the mapped file.
        if len(places) == 1 and all(map(len, ranges)):
            ((place, data),) = self._read(places)
            if data is not None:
                return data[
                    tuple(
                        slice(r.start - p * c, r.stop - p * c)
                        for r, p, c in zip(ranges, place, self._chunk, strict=True)
                    )
                ]
            places = []
        out = np.full([len(r) for r in ranges], self.fill, self.dtype)
        for place, data in self._read(places):
            if data is not None:
                self._copy(place, data, ranges, out)
        return out

    def _copy(
        self, place: ChunkPlace, data: np.ndarray, ranges: list[range], out: np.ndarray
    ) -> None:
        source = []
        target = []
        for p, c, r in zip(place, self._chunk, ranges, strict=True):
            # The part of chunk p, [p c, (p + 1) c), that lies in the range.
            low = max(r.start, p * c)
            high = min(r.stop, (p + 1) * c)
            source.append(slice(low - p * c, high - p * c))
            target.append(slice(low - r.start, high - r.start))
        out[tuple(target)] = data[tuple(source)]

    def _take(self, parts: list[Part], axis: int) -> np.ndarray:
        """Return listed places along one dimension, chunk by chunk along it."""
        wanted = np.asarray(parts[axis])
        out = np.empty([len(part) for part in parts], self.dtype)
        target: list[slice | np.ndarray] = [slice(None)] * self.ndim
        # Sorted, the listed places fall into stretches of one chunk each, and every chunk is read once, however
        # often and in whatever order its places are listed.
        order = np.argsort(wanted, kind="stable")
        edges = np.flatnonzero(np.diff(wanted[order] // self._chunk[axis])) + 1
        for here in np.split(order, edges) if len(order) else ():
            low = int(wanted[here[0]])
            high = int(wanted[here[-1]]) + 1
            stretch = [*parts[:axis], range(low, high), *parts[axis + 1 :]]
            target[axis] = here
            out[tuple(target)] = self._basic(_ranges(stretch)).take(wanted[here] - low, axis)
        return out

    def _parts(self, key: Any) -> tuple[list[Part], list[bool]]:
        """Return the places that an index takes along each dimension, and which dimensions it drops."""
        keys = [key]
        if isinstance(key, tuple):
            keys = list(key)
        if any(part is Ellipsis for part in keys):
            at = next(i for i, part in enumerate(keys) if part is Ellipsis)
            keys[at : at + 1] = [slice(None)] * (self.ndim - len(keys) + 1)
        keys += [slice(None)] * (self.ndim - len(keys))
        if len(keys) > self.ndim:
            raise IndexError(
                f"{self.name} has {self.ndim} dimensions {self.dims}; got {len(keys)} indices"
            )
        parts = list[Part]()
        dropped = list[bool]()
        for part, size, dim in zip(keys, self.shape, self.dims, strict=True):
            one = not isinstance(part, slice) and np.ndim(part) == 0
            parts.append(self._one(part, size, dim) if one else self._many(part, size, dim))
            dropped.append(one)
        return parts, dropped

    def _one(self, part: Any, size: int, dim: str) -> range:
        try:
            if isinstance(part, bool | np.bool_):
                raise TypeError
            index = operator.index(part)
        except TypeError:
            raise IndexError(
                f"{self.name}: {part!r} along {dim}; expected an integer, a slice, a list of integers or a mask"
            ) from None
        self._check_inside(index, index, size, dim)
        return range(index % size, index % size + 1)

    def _many(self, part: Any, size: int, dim: str) -> Part:
        if isinstance(part, slice):
            chosen = range(size)[part]
            if chosen.step != 1:
                raise IndexError(
                    f"{self.name}: step {chosen.step} along {dim}; only whole ranges can be read, "
                    "take every n-th value of the result"
                )
            return chosen
        if np.size(part):
            listed = np.asarray(part)
        else:
            listed = np.zeros(0, np.int64)
        if listed.ndim != 1 or listed.dtype.kind not in "biu":
            raise IndexError(
                f"{self.name}: an index of shape {listed.shape} and type {listed.dtype} along {dim}; expected a list "
                "of integers or a mask"
            )
        if listed.dtype.kind == "b":
            if len(listed) != size:
                raise IndexError(
                    f"{self.name}: a mask of {len(listed)} values along {dim}, which has {size}"
                )
            return np.flatnonzero(listed)
        if len(listed):
            self._check_inside(int(listed.min()), int(listed.max()), size, dim)
        return listed.astype(np.int64) % size

    def _check_inside(self, low: int, high: int, size: int, dim: str) -> None:
        if low < -size or high >= size:
            wrong = high
            if low < -size:
                wrong = low
            raise IndexError(
                f"{self.name}: index {wrong} is out of range along {dim}, which has {size}"
            )


def _ranges(parts: list[Part]) -> list[range]:
    return [part for part in parts if isinstance(part, range)]
