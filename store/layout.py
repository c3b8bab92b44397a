"""Where every value of a run lies: array specifications, shard and chunk shapes, and their Zarr v3 metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from headwater.store.raw import check_paths, from_raw
from headwater.store.shard import CRC_BYTES, round_up

LEADING = ("depth", "layer")
DTYPES = ("bool", "float16", "float32", "float64", "int32", "int64")
CODECS = {"none": None, "zstd-1": 1, "zstd-3": 3}
LAYER_BYTES = 8 << 20
SHARD_BYTES = 128 << 20
CHUNK_BYTES = 3 << 20
HEAD_TILE_BYTES = 96 << 10


@dataclass(frozen=True)
class ArraySpec:
    """One array of a run.

    `shard` is the shape of a file and `chunk` that of an inner chunk; both cover at least the array along every
    dimension but the sequence. `codec` is a key of CODECS; `fill` is what reads where nothing was written.
    """

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    shard: tuple[int, ...]
    codec: str
    fill: float
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def axis(self) -> str | None:
        """The leading dimension `depth` or `layer`, None for arrays that begin with the sequence."""
        if self.dims[0] in LEADING:
            return self.dims[0]
        return None

    @property
    def sequence_dim(self) -> int:
        """Where the sequence stands among the dimensions: behind `depth` or `layer` where there is one."""
        return int(self.axis is not None)

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """Inner chunks of a shard along each dimension."""
        return tuple(-(-s // c) for s, c in zip(self.shard, self.chunk, strict=True))

    @property
    def tiled(self) -> bool:
        """Whether the array is a square of causal tiles."""
        return self.dims[-2:] == ("query", "key")

    @property
    def chunk_bytes(self) -> int:
        """Bytes of an inner chunk before its codec."""
        return prod(self.chunk) * np.dtype(self.dtype).itemsize

    @property
    def sequences_per_shard(self) -> int:
        return self.shard[self.sequence_dim]

    @property
    def sequences_per_chunk(self) -> int:
        return self.chunk[self.sequence_dim]

    @property
    def layers_per_shard(self) -> int:
        if self.axis is None:
            return 1
        return self.shard[0]

    def shard_path(self, axis_shard: int, sequence_shard: int) -> str:
        """Return a shard's path inside the run, such as `resid/c/3/0/0/0`."""
        lead = [axis_shard]
        if self.axis is None:
            lead = []
        rest = [0] * (len(self.dims) - len(lead) - 1)
        return "/".join(map(str, [self.name, "c", *lead, sequence_shard, *rest]))

    def block_shards(self, first: int, last: int) -> list[str]:
        """List the shards that hold sequences [first, last)."""
        if self.axis is None:
            n_axis = 1
        else:
            n_axis = -(-self.shape[0] // self.shard[0])
        per = self.sequences_per_shard
        return [
            self.shard_path(a, s)
            for a in range(n_axis)
            for s in range(first // per, -(-last // per))
        ]

    def n_tiles(self) -> int:
        """Causal tiles of one head: the lower triangle of the tile grid."""
        # 1 + 2 + … + side: key tiles at and left of the diagonal, for each row of tiles.
        side = -(-self.shape[-1] // self.chunk[-1])
        return side * (side + 1) // 2

    def stored_bytes(self, n_sequences: int) -> int:
        """Bytes on disk of `n_sequences`, before a codec: chunks as they are aligned, and the shards' indexes."""
        if self.axis is None:
            lead = 1
        else:
            lead = self.shape[0]
        # Ceil along both dimensions that shards divide: layers (or depths), and sequences.
        n_shards = -(-lead // self.layers_per_shard) * -(-n_sequences // self.sequences_per_shard)
        if self.tiled:
            n_chunks = n_sequences * -(-self.shape[2] // self.chunk[2]) * self.n_tiles()
        else:
            n_chunks = -(-n_sequences // self.sequences_per_chunk) * prod(
                self.grid[self.sequence_dim + 1 :]
            )
        # Every chunk takes whole pages, with its checksum; a shard's index is 16 bytes a chunk and a checksum.
        per_chunk = round_up(self.chunk_bytes + CRC_BYTES)
        return lead * n_chunks * per_chunk + n_shards * (16 * prod(self.grid) + CRC_BYTES)

    def metadata(self) -> dict[str, Any]:
        """Return the array's zarr.json."""
        inner = [_BYTES, *_zstd(CODECS[self.codec]), _CRC32C]
        sharding = {
            "chunk_shape": list(self.chunk),
            "codecs": inner,
            "index_codecs": [_BYTES, _CRC32C],
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": sharding}]
        return array_metadata(
            self.shape, self.dtype, self.shard, codecs, self.fill, self.dims, self.attributes
        )

    def to_json(self) -> dict[str, Any]:
        """Return the specification as JSON values; NaN becomes null."""
        raw = asdict(self)
        raw["fill"] = None if math.isnan(self.fill) else self.fill
        return raw

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> ArraySpec:
        """Read what `to_json` gave; raise ValueError for what no array can be."""
        fill = raw.get("fill")
        spec = from_raw(ArraySpec, {**raw, "fill": math.nan if fill is None else fill})
        spec = replace(
            spec,
            dims=tuple(spec.dims),
            shape=tuple(spec.shape),
            chunk=tuple(spec.chunk),
            shard=tuple(spec.shard),
        )
        check_paths([spec.name])
        sizes = (*spec.shape, *spec.chunk, *spec.shard)
        if (
            not 1 <= len(spec.dims) == len(spec.shape) == len(spec.chunk) == len(spec.shard)
            or not all(1 <= size < 1 << 48 for size in sizes)
            or any(s % c for s, c in zip(spec.shard, spec.chunk, strict=True))
            or spec.dims.count("sequence") != 1
            or spec.dims.index("sequence") != spec.sequence_dim
            or spec.dtype not in DTYPES
            or spec.codec not in CODECS
        ):
            raise ValueError(f"its array {spec.name} is none that can be stored: {dict(raw)}"[:300])
        return spec


_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC32C = {"name": "crc32c"}


def _zstd(level: int | None) -> list[dict[str, Any]]:
    if level is None:
        return []
    return [{"name": "zstd", "configuration": {"level": level, "checksum": False}}]


def array_metadata(
    shape: Sequence[int],
    dtype: str,
    chunk: Sequence[int],
    codecs: list[dict[str, Any]] | None,
    fill: float,
    dims: Sequence[str],
    attributes: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a Zarr v3 zarr.json; without `codecs`, plain chunks with a checksum."""
    value: Any = fill
    if np.dtype(dtype).kind == "f":
        if math.isnan(fill):
            value = "NaN"
        else:
            value = float(fill)
    elif dtype == "bool":
        value = bool(fill)
    plain = [_BYTES if np.dtype(dtype).itemsize > 1 else {"name": "bytes"}, _CRC32C]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": value,
        "codecs": codecs or plain,
        "attributes": dict(attributes),
        "dimension_names": list(dims),
        "storage_transformers": [],
    }


def sequence_bytes(spec: ArraySpec) -> int:
    """Return the bytes of one sequence at one layer or depth of an array; of causal tiles, those that are stored."""
    lead = spec.sequence_dim + 1
    if spec.tiled:
        return spec.n_tiles() * spec.shape[2] * prod(spec.chunk[3:]) * np.dtype(spec.dtype).itemsize
    return prod(spec.shape[lead:]) * np.dtype(spec.dtype).itemsize


def tile_edge(n_positions: int) -> int:
    """Choose the edge of the causal tiles: T up to 256, else the largest of 256, 128, 64 whose stored size is within
    4/3 of the smallest (300 → 64, 512 and 1024 → 256)."""
    if n_positions <= 256:
        return n_positions

    def stored(edge: int) -> int:
        # Stored values of a head: side (side + 1) / 2 tiles of edge² each, T² / 2 and half a tile row more.
        side = -(-n_positions // edge)
        return side * (side + 1) // 2 * edge * edge

    # Large tiles read and write faster, small ones waste less above the diagonal: the largest that wastes at
    # most a third more than the best of the three.
    smallest = min(map(stored, (256, 128, 64)))
    return next(edge for edge in (256, 128, 64) if 3 * stored(edge) <= 4 * smallest)


def make_spec(
    name: str,
    dims: tuple[str, ...],
    sizes: Mapping[str, int],
    dtype: str,
    codec: str,
    fill: float,
    block: int,
    attributes: Mapping[str, Any],
) -> ArraySpec:
    """Choose shard and chunk shapes of an array; `sizes` gives the length of every dimension, `block` of a block.

    A shard holds all layers where one layer's part of a block is under 8 MiB and all layers of a sequence are within
    128 MiB, else one layer; and the largest share of a block (halved from the whole) that stays within 128 MiB.
    """
    # No shard may hold sequences of two blocks, so it holds a block's sequences, or what is left of them after
    # halving. Few large files are better: every one costs a rename and a fsync.
    shape = tuple(sizes[d] for d in dims)
    lead = 0
    if dims[0] in LEADING:
        lead = 1
    chunk_rest, shard_rest, per_sequence = _rest(
        dims[lead + 1 :], shape[lead + 1 :], np.dtype(dtype).itemsize
    )
    together = (
        lead and per_sequence * block < LAYER_BYTES and per_sequence * shape[0] <= SHARD_BYTES
    )
    n_lead = 1
    if together:
        n_lead = shape[0]
    # bytes of a shard = sequences · layers in it · bytes of a sequence at one layer ≤ SHARD_BYTES.
    per_shard = _halve(block, SHARD_BYTES // max(per_sequence * n_lead, 1))
    tiled = dims[-2:] == ("query", "key")
    if tiled:
        per_chunk = 1
    else:
        per_chunk = _halve(per_shard, CHUNK_BYTES // max(per_sequence, 1))
    return ArraySpec(
        name,
        dims,
        shape,
        dtype,
        (1,) * lead + (per_chunk, *chunk_rest),
        (n_lead,) * lead + (per_shard, *shard_rest),
        codec,
        fill,
        dict(attributes),
    )


def _halve(whole: int, limit: int) -> int:
    """Halve `whole` until it is within `limit`, down to 1."""
    while whole > max(limit, 1):
        whole //= 2
    return whole


def _rest(
    dims: tuple[str, ...], shape: tuple[int, ...], itemsize: int
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return chunk and shard shape behind the sequence, and the bytes of one sequence."""
    if dims[-2:] == ("query", "key"):
        # Heads of a tile that go into one chunk: the fewest that divide the heads and reach HEAD_TILE_BYTES, so
        # that one head's pattern is read without all the others and a chunk is still worth a read.
        n_head = shape[0]
        edge = tile_edge(shape[-1])
        heads = next(
            h
            for h in range(1, n_head + 1)
            if n_head % h == 0 and (h == n_head or h * edge * edge * itemsize >= HEAD_TILE_BYTES)
        )
        side = -(-shape[-1] // edge)
        stored = n_head * side * (side + 1) // 2 * edge * edge * itemsize
        return (heads, edge, edge), (n_head, side * edge, side * edge), stored
    # Cut along the positions only where a sequence is more than a chunk, in steps of 16 positions.
    row = prod(shape[1:]) * itemsize
    if dims[0] == "head":
        parts = 1
    else:
        parts = -(-row * shape[0] // CHUNK_BYTES)
    if parts == 1:
        step = shape[0]
    else:
        step = -(-shape[0] // parts // 16) * 16 or 16
    return (step, *shape[1:]), (-(-shape[0] // step) * step, *shape[1:]), row * shape[0]
