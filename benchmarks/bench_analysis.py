"""Analyses of a run of realistic residuals: memory, reading speed, GEMM rate, beside dask and scikit-learn.

The run is made here (see `synthetic`). Every case is a process of its own, given the same files, budget of memory and
number of threads. Reading is compared with plain reads of the same files from end to end, by as many threads as a
stream has, in the same state: dropped from the page cache before, or (cases "cached") all in it. Products are compared
with the machine's rate in float64. Rounds are interleaved; seconds are medians, ratios medians of the ratios within a
round. Bytes are those of the files. peak_MB is the memory that the process itself takes at its peak, less what it had
before; pages of mapped files, which the system takes back when it needs them, are in mapped_MB.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from headwater.benchmarks.lib.analysis_cases import (
    CASES,
    Figures,
    K,
    files_of,
    files_of_depth,
    middle,
    read,
)
from headwater.benchmarks.lib.measure import write_csv
from headwater.benchmarks.lib.synthetic import make_run
from headwater.store.reader import Run, open_run

CACHED = ", cached"
PEERS = ("dask", "scikit-learn")
SAMPLE_SECONDS = 0.005
TINY_BYTES = 8 * 5 * 64 * 48 * 2


def drop_cache(run: Run) -> None:
    """Take a run's shards out of the page cache."""
    for path in files_of(run):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def float64_rate(width: int) -> float:
    """Return FLOP/s of one thread in products XᵀY in float64, of the shape that `svd` makes."""
    rows = np.random.default_rng(0).standard_normal((4096, width))
    other = rows.copy()
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        rows.T @ other
        seconds.append(time.perf_counter() - start)
    return 2 * rows.size * width / min(seconds)


def resident() -> dict[str, int]:
    """Return the bytes of this process in memory: its own (`anon`) and those of mapped files (`file`)."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {kind: int(fields[f"Rss{kind.title()}"].split()[0]) * 1024 for kind in ("anon", "file")}


@contextmanager
def watch_memory(found: Figures) -> Iterator[None]:
    """Put the peaks of memory above the present into `found`, looked at every 5 ms; nothing where /proc is missing."""
    with suppress(OSError):
        resident()
        done = threading.Event()
        before = resident()
        peak = dict(before)

        def watch() -> None:
            while not done.wait(SAMPLE_SECONDS):
                now = resident()
                peak.update({kind: max(peak[kind], now[kind]) for kind in now})

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            found |= {f"{kind}_bytes": peak[kind] - before[kind] for kind in peak}
        return
    yield


def measure_case(name: str, path: Path, threads: int, memory: int) -> Figures:
    """Run one case in this process, after a tiny run that brings its imports, and return its figures."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        CASES[name](make_run(Path(folder), TINY_BYTES, 4, 48, 64), threads, memory)
    run = open_run(path)
    drop_cache(run)
    if name.endswith(CACHED):
        read(files_of_depth(run))
    figures: Figures = {}
    with watch_memory(figures):
        start = time.perf_counter()
        cpu = time.process_time()
        figures |= CASES[name](run, threads, memory)
        figures |= {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,
        }
    if "flops" in figures:
        figures["rate"] = float64_rate(run["resid"].shape[-1])
    return figures


def exact_sigma(run: Run) -> np.ndarray:
    """Return the first K singular values of one centred depth, in float64 by numpy."""
    width = run["resid"].shape[-1]
    n = 0
    total = np.zeros(width)
    products = np.zeros((width, width))
    for sequence in range(run.manifest.n_sequences):
        rows = run["resid"][middle(run), sequence].astype(np.float64)
        n = n + len(rows)
        total = total + rows.sum(0)
        products = products + rows.T @ rows
    return np.asarray(np.sqrt(np.linalg.eigvalsh(products - np.outer(total, total) / n)[::-1][:K]))


def exact_consecutive(run: Run) -> np.ndarray:
    """Return the mean cosines of consecutive depths, in float64 by numpy."""
    total = np.zeros(len(run.leads("resid")) - 1)
    for sequence in range(run.manifest.n_sequences):
        x = run["resid"][:, sequence].astype(np.float64)
        norm = np.linalg.norm(x, axis=-1)
        total += ((x[1:] * x[:-1]).sum(-1) / (norm[1:] * norm[:-1])).mean(1)
    return total / run.manifest.n_sequences


def error_of(figures: Figures, sigma: np.ndarray, consecutive: np.ndarray) -> str:
    """Return the largest error of a case, relative of singular values and absolute of cosines; "" of a mere read."""
    if "sigma" in figures:
        got = np.array(figures["sigma"])
        return f"{np.abs(got / sigma[: len(got)] - 1).max():.1e}"
    if "consecutive" in figures:
        return f"{np.abs(np.array(figures['consecutive']) - consecutive).max():.1e}"
    return ""


def raw_of(name: str) -> str:
    """Name the plain read that a case is compared with."""
    return (
        "raw read"
        + (", one depth" if "one depth" in name else "")
        + (CACHED if name.endswith(CACHED) else "")
    )


def measure_rounds(
    path: Path, threads: int, memory: int, cases: list[str], rounds: int
) -> dict[str, list[Figures]]:
    """Measure the cases in turn, each in a process of its own; one that fails is named and left out.

    The peers take minutes, and are measured in the first round only.
    """
    found: dict[str, list[Figures]] = {name: [] for name in cases}
    blas = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    for at in range(rounds):
        for name in [name for name in found if not at or not name.startswith(PEERS)]:
            command = [
                sys.executable,
                "-m",
                "headwater.benchmarks.bench_analysis",
                "--case",
                name,
                "--run",
                str(path),
            ]
            command += ["--threads", str(threads), "--memory", str(memory >> 20)]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | blas)
            if done.returncode:
                print(
                    f"{name}: {(done.stderr.strip() or 'killed').splitlines()[-1]}", file=sys.stderr
                )
                del found[name]
                continue
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def run(path: Path, threads: int, memory: int, cases: list[str], rounds: int = 1) -> list[Figures]:
    """Measure the cases and return the rows of the results."""
    found = measure_rounds(path, threads, memory, cases, rounds)
    stored = open_run(path)
    n_bytes = sum(file.stat().st_size for file in files_of(stored))
    keys = {key for each in found.values() for key in each[0]}
    if "sigma" in keys:
        sigma = exact_sigma(stored)
    else:
        sigma = np.ones(K)
    if "consecutive" in keys:
        consecutive = exact_consecutive(stored)
    else:
        consecutive = np.ones(1)

    def rates(name: str, what: str) -> list[float]:
        return [n_bytes * f.get("share", 1) * f.get("reads", 1) / f[what] for f in found[name]]

    def of_raw(name: str, what: str) -> float | str:
        if raw_of(name) not in found:
            return ""
        pairs = zip(rates(name, what), rates(raw_of(name), what), strict=False)
        return round(statistics.median(own / raw for own, raw in pairs), 3)

    rows = []
    for name, each in found.items():
        gemm = [f["flops"] / f["seconds"] / f["rate"] / threads for f in each if "flops" in f]
        anon, mapped = (
            max(f.get(f"{kind}_bytes", 0) for f in each) >> 20 for kind in ("anon", "file")
        )
        rows.append(
            {
                "case": name,
                "run_GB": round(n_bytes / 1e9, 2),
                "threads": threads,
                "rounds": len(each),
                "seconds": round(statistics.median(f["seconds"] for f in each), 2),
                "GB_per_second": round(statistics.median(rates(name, "seconds")) / 1e9, 3),
                "of_raw_read": of_raw(name, "seconds"),
                "of_raw_read_cpu": of_raw(name, "cpu_seconds"),
                "of_gemm_rate": round(statistics.median(gemm), 3) if gemm else "",
                "peak_MB": anon,
                "mapped_MB": mapped,
                "budget_MB": memory >> 20,
                "error": error_of(each[0], sigma, consecutive),
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and write it to benchmarks/results with --save."""
    parser = argparse.ArgumentParser(
        prog="python -m headwater.benchmarks analysis", description=__doc__
    )
    parser.add_argument("--gigabytes", type=float, default=10.0, help="size of the run")
    parser.add_argument("--memory", type=int, default=1024, help="budget of every analysis, MB")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3, help="times that every case is measured")
    parser.add_argument("--run", help="a run that was made before, instead of a new one")
    parser.add_argument("--cases", help="cases by name, with semicolons (default: all)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help="where to make the run (default: a temporary folder)")
    parser.add_argument(
        "--save", action="store_true", help="write the figures to benchmarks/results"
    )
    options = parser.parse_args(arguments)
    memory = options.memory << 20
    if options.case:
        print(json.dumps(measure_case(options.case, Path(options.run), options.threads, memory)))
        return 0
    if options.cases:
        cases = [name.strip() for name in options.cases.split(";")]
    else:
        cases = list(CASES)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if not options.run:
            make_run(Path(folder), int(options.gigabytes * 1e9))
        path = Path(options.run or Path(folder) / "run")
        rows = run(path, options.threads, memory, cases, options.rounds)
    for row in rows:
        print(
            "  ".join(
                f"{value}" if name == "case" else f"{name} {value}" for name, value in row.items()
            )
        )
    if options.save:
        print(write_csv("analysis", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
