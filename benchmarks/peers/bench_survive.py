"""Kill captures of Headwater and its peers with signal 9, and see what is left and what a rerun does."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from headwater.benchmarks.bench_extract import SIZES
from headwater.benchmarks.lib.measure import write_csv
from headwater.benchmarks.peers.environments import PEERS, cache_folder
from headwater.benchmarks.peers.peer_inputs import prepare_model
from headwater.benchmarks.peers.survive import Work, survive


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and write it to benchmarks/results with --save."""
    parser = argparse.ArgumentParser(
        prog="python -m headwater.benchmarks survive", description=__doc__
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--kills", type=int, default=6, help="of every peer")
    parser.add_argument(
        "--peers", nargs="+", choices=[p.name for p in PEERS], default=[p.name for p in PEERS]
    )
    parser.add_argument(
        "--cache",
        help="where environments and models are kept (default ~/.cache/headwater-benchmarks)",
    )
    parser.add_argument(
        "--folder", help="where to write what is captured (default: a temporary folder)"
    )
    parser.add_argument(
        "--save", action="store_true", help="write the figures to benchmarks/results"
    )
    options = parser.parse_args(arguments)
    cache = cache_folder(options.cache)
    chosen = [peer for peer in PEERS if peer.name in options.peers]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        work = make_work(
            options.size, options.sequences, options.seq_len, options.kills, cache, Path(folder)
        )
        rows = survive(chosen, work, cache, Path(folder))
    print(
        f"{'':16}{'written':>8}{'right':>7}{'missing':>9}{'silently wrong':>16}{'kept':>7}  rerun"
    )
    for row in rows:
        counts = f"{row['written']:>8}{row['right']:>7}{row['missing']:>9}{row['silently_wrong']:>16}{row['kept']:>7}"
        print(f"{row['case']:16}" + (row["problem"] or f"{counts}  {row['rerun']}"))
    if options.save:
        print(write_csv("survive", rows))
    return 0


def make_work(size: str, n: int, seq_len: int, kills: int, cache: Path, folder: Path) -> Work:
    """Make the model and the ids of the captures that are killed."""
    ids = np.random.default_rng(0).integers(0, SIZES[size][-1], (n, seq_len), dtype=np.int32)
    np.save(folder / "ids.npy", ids)
    batch = max(2048 // seq_len, 1)
    return Work(
        prepare_model(size, cache), folder / "ids.npy", n, seq_len, SIZES[size][0] + 1, batch, kills
    )


if __name__ == "__main__":
    sys.exit(main())
