"""Two Ray workers against one on a compute-bound job, and what a block costs beside its own work.

Every worker has one thread. Speeds are taken from the first finished round of blocks on, so the start of Ray, which
`whole_seconds` counts, is left out. `driver_ms` is processor time of the driver per block; `gap_ms` is the time per
block in which the only worker neither computed nor waited for its disk.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from headwater.benchmarks.bench_extract import SIZES, STATISTICS, make_model
from headwater.benchmarks.lib.measure import write_csv
from headwater.benchmarks.lib.rows import Row
from headwater.extractor.cluster.members import busy_seconds
from headwater.extractor.request import RunConfig
from headwater.extractor.run import Progress, extract

COLUMNS = (
    "case",
    "workers",
    "threads",
    "blocks",
    "tokens_per_second",
    "x_one_worker",
    "driver_ms",
    "gap_ms",
    "whole_seconds",
)


class Clock:
    """An observer that notes when each block came in, and the driver's processor time then."""

    def __init__(self) -> None:
        self.done, self.seen = 0, list[tuple[float, float, int]]()

    def __call__(self, progress: Progress) -> None:
        if progress.entry is not None and progress.done > self.done:
            self.done = progress.done
            self.seen.append((time.perf_counter(), time.process_time(), progress.n_tokens))


def timed(config: RunConfig, case: str, skip: int) -> Row:
    """Extract a run and return its row; the first `skip` blocks only start the clock."""
    clock = Clock()
    start = time.perf_counter()
    run = extract(config, clock)
    whole = time.perf_counter() - start
    (begun, cpu_begun, tokens_begun), (ended, cpu_ended, tokens) = (
        clock.seen[skip - 1],
        clock.seen[-1],
    )
    n = len(clock.seen) - skip
    busy = statistics.fmean(busy_seconds(entry) for entry in run.ledger.entries())
    return {
        "case": case,
        "workers": config.workers,
        "threads": config.threads,
        "blocks": len(clock.seen),
        "tokens_per_second": round((tokens - tokens_begun) / (ended - begun), 1),
        "x_one_worker": "",
        "driver_ms": round(1e3 * (cpu_ended - cpu_begun) / n, 3) if config.workers else "",
        "gap_ms": round(1e3 * ((ended - begun) / n - busy), 3) if config.workers == 1 else "",
        "whole_seconds": round(whole, 2),
    }


def compute_bound(size: str, seq_len: int, n_blocks: int, rounds: int, folder: Path) -> list[Row]:
    """Measure in-process, one and two workers in turn on statistics, which cost much arithmetic and few bytes."""
    make_model(folder / "model", size, seq_len)
    block = max(2048 // seq_len, 1)
    ids = np.random.default_rng(0).integers(
        0, SIZES[size][-1], (n_blocks * block, seq_len), dtype=np.int32
    )
    np.save(folder / "ids.npy", ids)
    rows: list[list[Row]] = []
    for i in range(rounds):
        row = []
        for workers in (0, 1, 2):
            config = RunConfig(
                out=str(folder / f"run-{i}-{workers}"),
                model=str(folder / "model"),
                tokens=str(folder / "ids.npy"),
                sites=STATISTICS,
                block=block,
                threads=1,
                workers=workers,
            )
            row.append(timed(config, size, max(workers, 1)))
        for each in row:
            each["x_one_worker"] = round(each["tokens_per_second"] / row[1]["tokens_per_second"], 3)
        rows.append(row)
    return sorted((each for row in rows for each in row), key=lambda each: int(each["workers"]))


def tiny_blocks(n_blocks: int, folder: Path) -> Row:
    """Measure what a block costs when there is next to nothing to compute."""
    make_model(folder / "tiny", "tiny", 16)
    np.save(folder / "tiny.npy", np.zeros((n_blocks, 16), np.int32))
    config = RunConfig(
        out=str(folder / "run-tiny"),
        model=str(folder / "tiny"),
        tokens=str(folder / "tiny.npy"),
        sites=("loss",),
        block=1,
        threads=1,
        workers=1,
    )
    return timed(config, "tiny blocks", 1)


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and write it to benchmarks/results with --save."""
    parser = argparse.ArgumentParser(
        prog="python -m headwater.benchmarks workers", description=__doc__
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument(
        "--blocks",
        type=int,
        default=16,
        help="of some 2,000 tokens, for the compute-bound job, or 0",
    )
    parser.add_argument(
        "--tiny-blocks",
        type=int,
        default=10_000,
        help="of 16 tokens, for the cost of a block, or 0",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to write the runs (default: a temporary folder)")
    parser.add_argument(
        "--save", action="store_true", help="write the figures to benchmarks/results"
    )
    options = parser.parse_args(arguments)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = []
        if options.blocks:
            rows += compute_bound(
                options.size, options.seq_len, options.blocks, options.rounds, Path(folder)
            )
        if options.tiny_blocks:
            rows.append(tiny_blocks(options.tiny_blocks, Path(folder)))
    print("".join(f"{name:>18}" for name in COLUMNS))
    for row in rows:
        print("".join(f"{row[name]:>18}" for name in COLUMNS))
    print(f"{os.cpu_count()} cores; load before the start {load_before:.1f}")
    if options.save:
        name = "tiny-blocks"
        if options.blocks:
            name = "workers"
        print(write_csv(name, [{"load_before": round(load_before, 2)} | row for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
