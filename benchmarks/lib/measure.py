"""Measure fairly on a noisy machine: everything in one process, in turn, medians of several rounds, ratios."""

from __future__ import annotations

import csv
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from headwater.benchmarks.lib.rows import Row
from headwater.benchmarks.registry import RESULTS
from headwater.kernels.cpu import products


def interleave(
    cases: Mapping[str, Callable[[], Any]], rounds: int, warm: bool = True
) -> dict[str, list[float]]:
    """Run every case once a round, in turn; return the seconds of each round, by case."""
    if warm:
        for case in cases.values():
            case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], case: str, to: str) -> float:
    """Return how many times faster `case` is than `to`: the median over rounds of the ratio within a round."""
    return statistics.median(b / a for a, b in zip(seconds[case], seconds[to], strict=True))


def gemm_rate(
    rows: int,
    inner: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
    limit: float = 3.0,
    device: str = "cpu",
) -> float:
    """Return the FLOP/s of the best of 12 large matrix products (fewer after `limit` seconds): a forward's limit.

    In float32 on a CPU of the better of torch and what the forward multiplies by.
    """
    a, b = (
        torch.randn(shape, device=device).to(dtype) for shape in ((rows, inner), (inner, columns))
    )
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    end = time.perf_counter() + limit
    seconds = list[float]()

    times = 20
    if device == "cpu":
        times = 1

    def multiply() -> None:
        for _ in range(times):
            torch.mm(a, b, out=out)
        synchronize(device)

    ways = [multiply]
    if device == "cpu" and dtype == torch.float32 and products.library() != "torch":
        ways.append(lambda: products.multiply(a[None], b, None, out[None]))
    while not seconds or (len(seconds) < 12 * len(ways) and time.perf_counter() < end):
        seconds += [timed(way) / times for way in ways]
    return 2 * rows * inner * columns / min(seconds)


def synchronize(device: str) -> None:
    """Wait for what was queued on a device."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def peak_bytes() -> int:
    """Return the peak resident memory of this process; its parent's, which getrusage passes on, does not count."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine(device: str = "cpu") -> dict[str, str]:
    """Name the machine, its GPU where one was used, and the software, for results files."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next(
                (line.split(":")[1].strip() for line in file if line.startswith("model name")), name
            )
    if device == "cpu":
        gpu = {}
    else:
        gpu = {"gpu": torch.cuda.get_device_name(device)}
    return {
        "date": date.today().isoformat(),
        "processor": f"{name} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "products": products.library(),
        **gpu,
    }


def results_folder() -> Path:
    """Return where results are written: benchmarks/results, or HEADWATER_RESULTS."""
    return Path(os.environ.get("HEADWATER_RESULTS") or RESULTS)


def write_csv(
    name: str,
    rows: list[Row],
    folder: Path | None = None,
    keys: Sequence[str] | None = None,
    device: str = "cpu",
) -> Path:
    """Write dated results with the machine's name in every row; return the file.

    With `keys`, rows of the same day that differ in one of these columns are kept: a table can be measured in parts.
    """
    folder = folder or results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{date.today().isoformat()}.csv"
    full = [machine(device) | row for row in rows]
    if keys and path.exists():
        replaced = {tuple(str(row[key]) for key in keys) for row in rows}
        with path.open(newline="") as file:
            old = [
                row
                for row in csv.DictReader(file)
                if tuple(row.get(key, "") for key in keys) not in replaced
            ]
        full = [*old, *full]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(column for row in full for column in row)))
        writer.writeheader()
        writer.writerows(full)
    return path


def timed(function: Callable[[], Any]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
