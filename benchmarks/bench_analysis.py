"""Analyses of a run of realistic residuals: memory, reading speed, GEMM rate, beside dask and scikit-learn.

The run is made here (see `synthetic`). Every case is a process of its own, given the same files and the same number of
threads, after the files were dropped from the page cache; reading is compared with plain reads of the same files in the
same way, and products with the machine's rate in float64. Bytes are those of the files; memory is what the process
takes at its peak, less what it had after its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from headwater.benchmarks.measure import peak_bytes, write_csv
from headwater.benchmarks.synthetic import make_run
from headwater.store.reader import Run, open_run

K = 32
READ_BYTES = 16 << 20
Figures = dict[str, Any]


def files_of(run: Run, site: str = "resid") -> list[Path]:
    """List the shards of a site."""
    return sorted(path for path in (Path(str(run.path)) / site / "c").rglob("*") if path.is_file())


def middle(run: Run) -> int:
    """Return the middle depth, which stands for one depth."""
    return len(run.leads("resid")) // 2


def drop_cache(run: Run) -> None:
    """Take a run's shards out of the page cache."""
    for path in files_of(run):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(files: list[Path], threads: int) -> None:
    def read(paths: list[Path]) -> None:
        buffer = np.empty(READ_BYTES, np.uint8)
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer.data):
                    pass

    with ThreadPoolExecutor(threads) as executor:
        list(executor.map(read, [files[i::threads] for i in range(threads)]))


def case_raw(run: Run, threads: int, memory: int) -> Figures:
    """Read every shard into one buffer a thread."""
    _read(files_of(run), threads)
    return {}


def case_norms(run: Run, threads: int, memory: int) -> Figures:
    """Norms and consecutive cosines of all depths, in one pass."""
    from headwater.analysis.norms import norms

    got = norms(run, scan=_scan(threads, memory))
    return {"error": _norm_error(run, got.consecutive[0].values)}


def case_cosine(run: Run, threads: int, memory: int) -> Figures:
    """Every variant of the cosine of every pair of depths, in two passes."""
    from headwater.analysis.cosine import cosine

    got = cosine(run, cka=None, scan=_scan(threads, memory))
    return {"error": _norm_error(run, got.consecutive.isel(centring=0, positions=0, outliers=0).values), "reads": 2}


def case_svd(run: Run, threads: int, memory: int) -> Figures:
    """Exact SVD of one depth, every variant, in float64."""
    from headwater.analysis.svd import svd

    got = svd(run, at=[middle(run)], k=K, scan=_scan(threads, memory))
    sigma = got.singular_value.sel(centring="centred", positions="all").values[0, :K]
    n_rows = run.manifest.n_sequences * run.manifest.n_positions
    flops = 2 * n_rows * run["resid"].shape[-1] ** 2
    return {"sigma": sigma.tolist(), "flops": flops, "share": 1 / len(run.leads("resid"))}


def case_stream(run: Run, threads: int, memory: int) -> Figures:
    """Shuffled batches of all depths."""
    depths = run.leads("resid")
    for _ in run.stream("resid", 4096, at=depths, threads=threads, buffer_bytes=memory // 2):
        pass
    return {}


def case_stream_one(run: Run, threads: int, memory: int) -> Figures:
    """Shuffled batches of one depth."""
    for _ in run.stream("resid", 4096, at=middle(run), threads=threads, buffer_bytes=memory // 4):
        pass
    return {"share": 1 / len(run.leads("resid"))}


def case_raw_one(run: Run, threads: int, memory: int) -> Figures:
    """Read the shards of one depth into one buffer a thread."""
    files = [path for path in files_of(run) if path.relative_to(str(run.path)).parts[2] == str(middle(run))]
    _read(files or files_of(run), threads)
    return {"share": 1 / len(run.leads("resid"))}


def case_sklearn(run: Run, threads: int, memory: int) -> Figures:
    """scikit-learn's IncrementalPCA of one depth."""
    from sklearn.decomposition import IncrementalPCA

    model = IncrementalPCA(K)
    for first in range(0, run.manifest.n_sequences, 4):
        rows = run["resid"][middle(run), first : first + 4].reshape(-1, run["resid"].shape[-1])
        if len(rows) >= K:
            model.partial_fit(rows.astype(np.float64))
    return {"sigma": model.singular_values_.tolist(), "share": 1 / len(run.leads("resid"))}


def case_dask_svd(run: Run, threads: int, memory: int) -> Figures:
    """dask's svd_compressed of one centred depth, with two power iterations."""
    da: Any = import_module("dask.array")
    rows = _dask(run)[middle(run)].reshape(-1, run["resid"].shape[-1]).astype(np.float64)
    sigma = da.linalg.svd_compressed(rows - rows.mean(0), K, n_power_iter=2, seed=0)[1]
    return {"sigma": sigma.compute(num_workers=threads).tolist(), "share": 1 / len(run.leads("resid"))}


def case_dask_norms(run: Run, threads: int, memory: int) -> Figures:
    """dask's norms and consecutive cosines of all depths."""
    da: Any = import_module("dask.array")
    x = _dask(run).astype(np.float32)
    norm = da.sqrt((x * x).sum(-1))
    cosine = ((x[1:] * x[:-1]).sum(-1) / (norm[1:] * norm[:-1])).mean((1, 2))
    means, _ = da.compute(cosine, norm.mean((1, 2)), num_workers=threads)
    return {"error": _norm_error(run, means)}


CASES: dict[str, Callable[[Run, int, int], Figures]] = {
    "raw read": case_raw,
    "norms": case_norms,
    "dask norms": case_dask_norms,
    "stream, all depths": case_stream,
    "raw read, one depth": case_raw_one,
    "stream, one depth": case_stream_one,
    "svd": case_svd,
    "scikit-learn IncrementalPCA": case_sklearn,
    "dask svd_compressed": case_dask_svd,
    "cosine": case_cosine,
}


def _scan(threads: int, memory: int) -> Any:
    from headwater.analysis.engine import Scan

    return Scan(workers=threads, memory=memory)


def _dask(run: Run) -> Any:
    import zarr

    return import_module("dask.array").from_zarr(zarr.open_array(str(run.path / "resid"), mode="r"))


def _rows(run: Run) -> np.ndarray:
    """Return one depth in the stored type: [row, d_model]."""
    return run["resid"][middle(run)].reshape(-1, run["resid"].shape[-1])


def _norm_error(run: Run, consecutive: np.ndarray) -> float:
    """Return the largest error of consecutive cosines against float64, on runs that are small enough, else NaN."""
    if run.manifest.n_sequences > 64:
        return float("nan")
    x = run["resid"][:].astype(np.float64)
    norm = np.linalg.norm(x, axis=-1)
    want = ((x[1:] * x[:-1]).sum(-1) / (norm[1:] * norm[:-1])).mean((1, 2))
    return float(np.abs(consecutive - want).max())


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


def measure_case(name: str, path: Path, threads: int, memory: int) -> Figures:
    """Run one case in this process and return its figures."""
    import torch

    import headwater.analysis.cosine
    import headwater.analysis.norms
    import headwater.analysis.stream
    import headwater.analysis.svd  # noqa: F401

    torch.set_num_threads(1)
    run = open_run(path)
    drop_cache(run)
    before = peak_bytes()
    start = time.perf_counter()
    cpu = time.process_time()
    figures = CASES[name](run, threads, memory)
    figures |= {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    figures["peak_bytes"] = peak_bytes() - before
    if "flops" in figures:
        figures["rate"] = float64_rate(run["resid"].shape[-1])
    return figures


def exact_sigma(run: Run) -> np.ndarray:
    """Return the first K singular values of one centred depth, in float64 by numpy."""
    rows = _rows(run).astype(np.float64)
    rows -= rows.mean(0)
    return np.asarray(np.sqrt(np.linalg.eigvalsh(rows.T @ rows)[::-1][:K]))


def run(path: Path, threads: int, memory: int, cases: list[str]) -> list[Figures]:
    """Measure the cases, each in a process of its own, and return the rows of the results."""
    rows, found = [], {}
    n_bytes = sum(file.stat().st_size for file in files_of(open_run(path)))
    blas = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    for name in cases:
        command = [sys.executable, "-m", "headwater.benchmarks.bench_analysis", "--case", name, "--run", str(path)]
        command += ["--threads", str(threads), "--memory", str(memory >> 20)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | blas)
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        found[name] = json.loads(done.stdout.splitlines()[-1])
    exact = exact_sigma(open_run(path)) if any("sigma" in figures for figures in found.values()) else np.ones(K)
    for name, figures in found.items():
        n_read = n_bytes * figures.get("share", 1) * figures.get("reads", 1)
        error = figures.get("error", float("nan"))
        if "sigma" in figures:
            error = float(np.abs(np.array(figures["sigma"]) / exact[: len(figures["sigma"])] - 1).max())
        raw = found.get("raw read, one depth" if "one depth" in name else "raw read")
        rate = n_read / figures["seconds"]
        full = n_bytes * (raw or {}).get("share", 1) / raw["seconds"] if raw else float("nan")
        cpu = n_bytes * (raw or {}).get("share", 1) / raw["cpu_seconds"] if raw else float("nan")
        flops = figures.get("flops", 0) / figures["seconds"]
        rows.append({
            "case": name, "run_GB": round(n_bytes / 1e9, 2), "threads": threads,
            "seconds": round(figures["seconds"], 2),
            "GB_per_second": round(rate / 1e9, 3), "of_raw_read": round(rate / full, 3),
            "of_raw_read_cpu": round(n_read / figures["cpu_seconds"] / cpu, 3),
            "of_gemm_rate": round(flops / figures["rate"] / threads, 3) if flops else "",
            "peak_MB": figures["peak_bytes"] >> 20, "budget_MB": memory >> 20, "error": f"{error:.1e}",
        })  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and write it to benchmarks/results with --save."""
    parser = argparse.ArgumentParser(prog="python -m headwater.benchmarks analysis", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=10.0, help="size of the run")
    parser.add_argument("--memory", type=int, default=1024, help="budget of every analysis, MB")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--run", help="a run that was made before, instead of a new one")
    parser.add_argument("--cases", help="cases by name, with semicolons (default: all)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help="where to make the run (default: a temporary folder)")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    options = parser.parse_args(arguments)
    memory = options.memory << 20
    if options.case:
        print(json.dumps(measure_case(options.case, Path(options.run), options.threads, memory)))
        return 0
    cases = [name.strip() for name in options.cases.split(";")] if options.cases else list(CASES)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if not options.run:
            make_run(Path(folder), int(options.gigabytes * 1e9))
        path = Path(options.run or Path(folder) / "run")
        rows = run(path, options.threads, memory, cases)
    for row in rows:
        print("  ".join(f"{value}" if name == "case" else f"{name} {value}" for name, value in row.items()))
    if options.save:
        print(write_csv("analysis", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
