"""Write, stream and pick from the same array in Headwater's store and in the stores that users know.

One float16 array [sequence, position, d_model], chunks of one sequence, 16 sequences a shard or file. `write` ends with
the fsync; `stream` reads every sequence once, in order, into one buffer, `cold` after the page cache was dropped;
`vector` reads one position of one sequence at random, of files that are open and in the page cache. Every value that
`stream` delivers is compared with what was written, in an untimed round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from headwater.benchmarks.lib.measure import interleave, ratio, write_csv
from headwater.benchmarks.lib.rows import Row
from headwater.benchmarks.storage.stores import BLOCK, STORES, Headwater, Store
from headwater.store.layout import make_spec

VECTORS = 200


def run(megabytes: int, rounds: int, folder: Path, d_model: int = 1024) -> list[Row]:
    """Measure every store in turn; return a row for each."""
    n = max(megabytes * (1 << 20) // (2048 * d_model), 2)
    sizes = {"sequence": n, "position": 1024, "d_model": d_model}
    spec = make_spec(
        "resid",
        ("sequence", "position", "d_model"),
        sizes,
        "float16",
        "none",
        np.nan,
        min(BLOCK, n),
        {},
    )
    values = (
        np.random.default_rng(0).standard_normal((n, 1024, d_model), np.float32).astype(np.float16)
    )
    stores = []
    problems = dict[str, str]()
    for kind in STORES:
        try:
            store = kind(folder, spec)
            store.write(values)
            _check(store, values)
            stores.append(store)
        except ImportError as error:
            problems[kind.name] = f"not installed: {error}"
    times = _measure(stores, values, rounds)
    size = values.nbytes / 1e6
    rows = []
    for store in stores:
        row: Row = {"case": store.name, "MB": round(size, 1)}
        for what, seconds in times.items():
            row[f"{what}_MB_per_second"] = round(size / statistics.median(seconds[store.name]))
            row[f"{what}_x"] = round(ratio(seconds, Headwater.name, store.name), 2)
        row["vector_ms"] = round(_vector_ms(store, n), 4)
        row["MB_on_disk"] = round(
            sum(512 * path.stat().st_blocks for path in store.files()) / 1e6, 1
        )
        rows.append({**row, "problem": ""})
    return rows + [
        dict.fromkeys(rows[0], "") | {"case": name, "problem": why}
        for name, why in problems.items()
    ]


def _measure(
    stores: Sequence[Store], values: np.ndarray, rounds: int
) -> dict[str, dict[str, list[float]]]:
    into = np.empty_like(values[0])

    def stream(store: Store) -> Callable[[], None]:
        def read() -> None:
            opened = store.open()
            for i in range(len(values)):
                np.copyto(into, store.read(opened, i))

        return read

    def write(store: Store) -> Callable[[], None]:
        return lambda: store.write(values)

    return {
        "write": interleave({s.name: write(s) for s in stores}, rounds, warm=False),
        "stream": interleave({s.name: stream(s) for s in stores}, rounds),
        "cold": _cold({s.name: (s, stream(s)) for s in stores}, rounds),
    }


def _cold(
    cases: dict[str, tuple[Store, Callable[[], None]]], rounds: int
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (store, read) in cases.items():
            for path in store.files():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            read()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _vector_ms(store: Store, n: int) -> float:
    random = np.random.default_rng(1)
    opened = store.open()
    seconds = []
    for sequence, position in random.integers(0, (n, 1024), (VECTORS, 2)):
        start = time.perf_counter()
        np.array(store.read(opened, (int(sequence), int(position))))
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def _check(store: Store, values: np.ndarray) -> None:
    opened = store.open()
    for i in range(len(values)):
        np.testing.assert_array_equal(store.read(opened, i), values[i], store.name)
    np.testing.assert_array_equal(
        store.read(opened, (len(values) - 1, 7)), values[-1, 7], store.name
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and write it to benchmarks/results with --save."""
    parser = argparse.ArgumentParser(
        prog="python -m headwater.benchmarks store", description=__doc__
    )
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    parser.add_argument(
        "--save", action="store_true", help="write the figures to benchmarks/results"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = run(options.megabytes, options.rounds, Path(folder))
    print(
        f"{'MB/s (× ours over theirs)':26}{'write':>16}{'stream':>16}{'cold':>16}{'vector ms':>11}{'MB':>8}"
    )
    for r in rows:
        if r["problem"]:
            print(f"{r['case']:26}{r['problem']}")
            continue
        rates = "".join(
            f"{r[f'{what}_MB_per_second']:>8} ({r[f'{what}_x']:>5})"
            for what in ("write", "stream", "cold")
        )
        print(f"{r['case']:26}{rates}{r['vector_ms']:>11}{r['MB_on_disk']:>8}")
    if options.save:
        print(write_csv("store", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
