"""A shard written by us is read bit-equal by the libraries that own the format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import ZstdCodec

from headwater.store.shard import PAGE, ShardWriter, decode_index, shard_sum


def make_array(
    path: Path, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str, level: int | None
) -> zarr.Array:
    from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

    inner: list[object] = [BytesCodec()]
    if level is not None:
        inner.append(ZstdCodec(level=level))
    inner.append(Crc32cCodec())
    codec = ShardingCodec(chunk_shape=chunk, codecs=inner)
    return zarr.create_array(
        path,
        shape=shape,
        chunks=shape,
        dtype=dtype,
        serializer=codec,
        compressors=None,
        filters=None,
        fill_value=0,
    )


@settings(max_examples=25, deadline=None)
@given(
    grid=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    dtype=st.sampled_from(["float16", "float32", "int64"]),
    level=st.sampled_from([None, 1]),
    direct=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_zarr_reads_what_we_wrote(tmp_path_factory, grid, dtype, level, direct, seed):
    rng = np.random.default_rng(seed)
    chunk = tuple(int(n) for n in rng.integers(1, 40, len(grid)))
    shape = tuple(g * c for g, c in zip(grid, chunk, strict=True))
    store = tmp_path_factory.mktemp("a")
    array = make_array(store / "x", shape, chunk, dtype, level)
    expected = np.zeros(shape, dtype)
    path = store / "x" / "c" / "/".join("0" * len(grid))
    path.parent.mkdir(parents=True)
    writer = ShardWriter(path, grid, level, direct)
    places = list(np.ndindex(*grid))
    rng.shuffle(places)
    for place in places[: len(places) - len(places) // 4]:
        data = rng.integers(-1000, 1000, chunk).astype(dtype)
        expected[tuple(slice(p * c, (p + 1) * c) for p, c in zip(place, chunk, strict=True))] = data
        writer.put(place, data)
    length, crc = writer.commit()
    assert path.stat().st_size == length
    with path.open("rb") as file:
        assert shard_sum(file, len(places)) == crc
    np.testing.assert_array_equal(array[:], expected)


def test_chunks_start_on_pages(tmp_path):
    writer = ShardWriter(tmp_path / "s", (3,))
    for i in range(3):
        writer.put((i,), np.arange(1000 + i, dtype=np.float32))
    writer.commit()
    index = decode_index((tmp_path / "s").read_bytes()[-52:], 3)
    assert (index[:, 0] % PAGE == 0).all()


def test_a_chunk_is_written_once(tmp_path):
    writer = ShardWriter(tmp_path / "s", (2,))
    writer.put((1,), np.zeros(4))
    with pytest.raises(ValueError, match="written twice"):
        writer.put((1,), np.zeros(4))
    writer.discard()
    assert not (tmp_path / "s").exists()


def test_a_damaged_index_is_refused(tmp_path):
    writer = ShardWriter(tmp_path / "s", (1,))
    writer.put((0,), np.zeros(4))
    writer.commit()
    tail = bytearray((tmp_path / "s").read_bytes()[-20:])
    tail[3] ^= 1
    with pytest.raises(ValueError, match="CRC32C"):
        decode_index(bytes(tail), 1)
    with pytest.raises(ValueError, match="cut short"):
        decode_index(bytes(tail[1:]), 1)
