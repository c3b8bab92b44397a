"""The shard writer against the raw write of the same bytes, and against the libraries that own the format."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from headwater.benchmarks.lib.measure import interleave, ratio, write_csv
from headwater.benchmarks.lib.rows import Row
from headwater.store.layout import make_spec
from headwater.store.ring import Slab
from headwater.store.shard import ShardWriter, round_up


def run(megabytes: int, rounds: int, folder: Path) -> list[Row]:
    """Write one shard of `megabytes` in every way, with its fsync; return the rows of the results."""
    n = max(megabytes // 2, 2)
    sizes = {"sequence": n, "position": 1024, "d_model": 1024}
    spec = make_spec(
        "resid", ("sequence", "position", "d_model"), sizes, "float16", "none", np.nan, n, {}
    )
    rng = np.random.default_rng(0)
    slab = Slab.make(1, spec.chunk_bytes)
    chunk = slab.chunks("float16", spec.chunk)
    chunk[:] = rng.standard_normal(spec.chunk, np.float32)
    n_chunks = int(np.prod(spec.grid))
    pages = slab.pages

    def raw(direct: bool) -> Callable[[], None]:
        def write() -> None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if direct else 0)
            file = os.open(folder / "raw", flags, 0o644)
            for _ in range(n_chunks):
                os.write(file, pages.reshape(-1).data)
            os.fsync(file)
            os.close(file)

        return write

    def ours() -> None:
        (folder / "ours").unlink(missing_ok=True)
        writer = ShardWriter(folder / "ours", spec.grid)
        for index in np.ndindex(*spec.grid):
            writer.put_pages([index], pages, spec.chunk_bytes)
        writer.commit()

    whole = np.concatenate([np.asarray(chunk[0])] * n_chunks)

    def zarr_python() -> None:
        import zarr

        array = zarr.create_array(
            folder / "zarr",
            shape=whole.shape,
            shards=whole.shape,
            chunks=spec.chunk,
            overwrite=True,
            dtype="float16",
            compressors=None,
            filters=None,
        )
        array[:] = whole
        _sync(folder / "zarr")

    def tensorstore() -> None:
        import tensorstore as ts

        metadata = spec.metadata() | {"shape": list(whole.shape)}
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = list(whole.shape)
        store = {"driver": "zarr3", "kvstore": f"file://{folder}/ts", "metadata": metadata}
        ts.open(store, create=True, delete_existing=True).result()[...] = whole
        _sync(folder / "ts")

    cases = {
        "raw write, O_DIRECT": raw(True),
        "raw write, buffered": raw(False),
        "headwater": ours,
        "zarr-python": zarr_python,
        "tensorstore": tensorstore,
    }
    seconds = interleave(cases, rounds)
    stored = n_chunks * round_up(spec.chunk_bytes + 4)
    return [
        {
            "case": name,
            "MB": stored / 1e6,
            "MB_per_second": round(stored / 1e6 / min(seconds[name])),
            "x_raw_direct": round(ratio(seconds, name, "raw write, O_DIRECT"), 3),
            "x_raw_buffered": round(ratio(seconds, name, "raw write, buffered"), 3),
        }
        for name in cases
    ]


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and write it to benchmarks/results with --save."""
    parser = argparse.ArgumentParser(
        prog="python -m headwater.benchmarks shard", description=__doc__
    )
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    parser.add_argument(
        "--save", action="store_true", help="write the figures to benchmarks/results"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = run(options.megabytes, options.rounds, Path(folder))
    print(f"{'case':22}{'MB/s':>8}{'× raw O_DIRECT':>17}{'× raw buffered':>17}")
    for r in rows:
        print(
            f"{r['case']:22}{r['MB_per_second']:>8}{r['x_raw_direct']:>17}{r['x_raw_buffered']:>17}"
        )
    if options.save:
        print(write_csv("shard", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
