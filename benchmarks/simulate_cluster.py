"""Simulate a cluster from the costs of a block: how far it scales, and what saturates first.

`python -m headwater.benchmarks.simulate_cluster` prints a table over numbers of workers. What a block costs a worker
with one processor, and the driver, are by default the newest figures of `headwater.benchmarks workers`; what a GPU,
a network and an object store cost is assumed. Every one is a flag that says where its default comes from.

The model: workers compute blocks, each of `--block-seconds` × a lognormal spread. When one ends, its bytes go through
the node's network (`--node-bandwidth`, shared by `--gpus-per-node` workers) and the store (`--store-bandwidth`, shared
by all), then its ledger entry is created (`--entry-seconds`, `--entries-per-second` in the store at most), then the
driver handles it (`--driver-seconds`, one after another). A worker computes its next block meanwhile, and waits where
two of its blocks are under way. Workers die every `--mtbf-hours` and lose the block that they compute.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import itertools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headwater.benchmarks.registry import RESULTS

IN_FLIGHT = 2
BLOCK_TOKENS = 16_384
START_SECONDS = 30.0


@dataclass(frozen=True)
class Costs:
    """What a block costs, in seconds and bytes, and what is shared."""

    block_seconds: float
    block_bytes: float
    spread: float
    driver_seconds: float
    entry_seconds: float
    entries_per_second: float
    node_bandwidth: float
    store_bandwidth: float
    gpus_per_node: int
    mtbf_hours: float


class Server:
    """Something that serves one request after another, and how long it was at it."""

    def __init__(self) -> None:
        self.free_at = self.busy = 0.0

    def serve(self, now: float, seconds: float) -> float:
        """Return when a request that comes now has been served."""
        self.free_at = max(self.free_at, now) + seconds
        self.busy += seconds
        return self.free_at


def simulate(costs: Costs, n_workers: int, n_blocks: int, seed: int = 0) -> dict[str, float]:
    """Run blocks through workers, network, store, ledger and driver; return the time taken and how busy each was."""
    random = np.random.default_rng(seed)
    driver = Server()
    ledger = Server()
    store = Server()
    networks = [Server() for _ in range(-(-n_workers // costs.gpus_per_node))]
    in_flight = [0] * n_workers
    free_at = [0.0] * n_workers
    order = itertools.count()
    events: list[tuple[float, int, str, int]] = [
        (0.0, next(order), "ask", w) for w in range(n_workers)
    ]
    events *= IN_FLIGHT
    heapq.heapify(events)
    left = n_blocks
    done = 0
    now = 0.0
    lost = 0
    compute = 0.0
    while done < n_blocks:
        now, _, what, worker = heapq.heappop(events)
        if what == "ask":
            if not left:
                continue
            left -= 1
            in_flight[worker] += 1
            took = costs.block_seconds * float(
                random.lognormal(-(costs.spread**2) / 2, costs.spread)
            )
            compute += took
            free_at[worker] = max(free_at[worker], now) + took
            dies = False
            if costs.mtbf_hours:
                dies = random.random() < took / (costs.mtbf_hours * 3600)
            heapq.heappush(
                events, (free_at[worker], next(order), "lost" if dies else "computed", worker)
            )
        elif what == "lost":
            lost += 1
            left += 1
            free_at[worker] = now + START_SECONDS
            heapq.heappush(events, (now + START_SECONDS, next(order), "ask", worker))
        elif what == "computed":
            sent = networks[worker // costs.gpus_per_node].serve(
                now, costs.block_bytes / costs.node_bandwidth
            )
            stored = store.serve(now, costs.block_bytes / costs.store_bandwidth)
            entry = (
                ledger.serve(max(sent, stored), 1 / costs.entries_per_second) + costs.entry_seconds
            )
            heapq.heappush(
                events, (driver.serve(entry, costs.driver_seconds), next(order), "done", worker)
            )
        else:
            done += 1
            in_flight[worker] -= 1
            heapq.heappush(events, (now, next(order), "ask", worker))
    return {
        "seconds": now,
        "gpu": compute / now / n_workers,
        "driver": driver.busy / now,
        "ledger": ledger.busy / now,
        "network": max(n.busy for n in networks) / now,
        "store": store.busy / now,
        "lost": lost,
    }


def limits(costs: Costs) -> dict[str, float]:
    """Return with how many workers each shared part would be busy all the time."""
    rate = 1 / costs.block_seconds
    return {
        "driver": 1 / (rate * costs.driver_seconds),
        "ledger": costs.entries_per_second / rate,
        "store": costs.store_bandwidth / (rate * costs.block_bytes),
        "network of a node": costs.node_bandwidth / (rate * costs.block_bytes),
    }


def measured(folder: Path) -> tuple[str, float, float]:
    """Return the newest results of `workers`: file, tokens a second of one worker, the driver's seconds a block."""
    path = max(folder.glob("workers-*.csv"))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rates = [
        float(r["tokens_per_second"])
        for r in rows
        if r["case"] != "tiny blocks" and r["workers"] == "1"
    ]
    (tiny,) = (float(r["driver_ms"]) for r in rows if r["case"] == "tiny blocks")
    return path.name, statistics.median(rates), tiny / 1e3


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    source, tokens_per_second, driver_seconds = measured(RESULTS)
    parser = argparse.ArgumentParser(
        prog="python -m headwater.benchmarks.simulate_cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--block-seconds",
        type=float,
        default=round(BLOCK_TOKENS / tokens_per_second, 2),
        help=f"computation of a block of 16,384 tokens (measured on one processor: {source})",
    )
    add(
        "--block-bytes",
        type=float,
        default=80e6,
        help="16,384 tokens × 5 kB: statistics of GPT-2 small",
    )
    add("--spread", type=float, default=0.1, help="deviation of the logarithm of that (assumed)")
    add(
        "--driver-seconds", type=float, default=round(driver_seconds, 5), help=f"measured: {source}"
    )
    add(
        "--entry-seconds",
        type=float,
        default=0.05,
        help="latency of an entry's PUT (assumed: 50 ms)",
    )
    add(
        "--entries-per-second",
        type=float,
        default=3500,
        help="PUTs a second of one prefix (S3's documented rate)",
    )
    add(
        "--node-bandwidth",
        type=float,
        default=3e9,
        help="bytes a second of a node's network (assumed: 25 Gbit/s)",
    )
    add(
        "--store-bandwidth",
        type=float,
        default=25e9,
        help="bytes a second of the store in all (assumed)",
    )
    add("--gpus-per-node", type=int, default=8)
    add(
        "--mtbf-hours",
        type=float,
        default=200,
        help="hours until a worker dies, on average (assumed); 0: never",
    )
    add("--workers", type=int, nargs="+", default=[1, 8, 16, 32, 64, 128, 256])
    add("--blocks", type=int, default=20_000)
    options = vars(parser.parse_args(arguments))
    workers = options.pop("workers")
    n_blocks = options.pop("blocks")
    costs = Costs(**options)
    print(
        "workers    seconds  speed-up  efficiency   driver   ledger  network    store  lost blocks"
    )
    alone = costs.block_seconds * n_blocks
    for n in workers:
        r = simulate(costs, n, n_blocks)
        print(
            f"{n:7} {r['seconds']:10,.0f} {alone / r['seconds']:9.1f} {r['gpu']:10.1%} {r['driver']:9.1%}"
            f"{r['ledger']:9.1%}{r['network']:9.1%}{r['store']:9.1%}{r['lost']:9.0f}"
        )
    found = limits(costs)
    rates = ", ".join(
        f"{name} {n / costs.block_seconds:,.0f} blocks/s" for name, n in found.items()
    )
    print(f"busy all the time at: {rates}")
    print("with workers: " + ", ".join(f"{name} {n:,.0f}" for name, n in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
