"""The small arrays of a run: plain chunks, each compared with the manifest whenever it is read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from headwater.store.chunked import ChunkedArray, ChunkPlace
from headwater.store.shard import CRC_BYTES


class SmallArray(ChunkedArray):
    """One of the arrays that are written once: tokens, labels, coordinates. `attributes` are those of its zarr.json."""

    def __init__(self, name: str, read_static: Callable[[str], bytes]) -> None:
        raw = json.loads(read_static(f"{name}/zarr.json"))
        self.attributes = dict(raw["attributes"])
        self._read_static = read_static
        fill = raw["fill_value"]
        super().__init__(
            name,
            tuple(raw["dimension_names"]),
            tuple(raw["shape"]),
            raw["data_type"],
            tuple(raw["chunk_grid"]["configuration"]["chunk_shape"]),
            math.nan if fill == "NaN" else fill,
        )

    def _read(self, places: Sequence[ChunkPlace]) -> Iterator[tuple[ChunkPlace, np.ndarray]]:
        for place in places:
            data = self._read_static("/".join(map(str, [self.name, "c", *place])))
            values = np.frombuffer(data[:-CRC_BYTES], self.dtype.newbyteorder("<"))
            yield place, values.reshape(self._chunk)


class CompleteArray(ChunkedArray):
    """Which sequences are committed, from the ledger: `complete` in the run repeats it for other readers."""

    def __init__(
        self, n_sequences: int, block: int, holds: Callable[[int, int], np.ndarray]
    ) -> None:
        super().__init__("complete", ("sequence",), (n_sequences,), "bool", (block,), False)
        self._holds = holds

    def _basic(self, ranges: list[range]) -> np.ndarray:
        (wanted,), (block,) = ranges, self._chunk
        # Blocks of the range, one flag each, spread to their sequences.
        first = wanted.start // block
        held = self._holds(first, -(-wanted.stop // block))
        return held[np.arange(wanted.start, wanted.stop) // block - first]

    def _read(self, places: Sequence[ChunkPlace]) -> Iterator[tuple[ChunkPlace, np.ndarray]]:
        raise NotImplementedError
