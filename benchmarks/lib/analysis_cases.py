"""What `bench_analysis` measures: reads, streams and analyses of a run, and what dask and scikit-learn make of them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

import headwater
from headwater.analysis.streams.stream import READERS
from headwater.benchmarks.lib.rows import Row
from headwater.store.reader import Run

K = 32
READ_BYTES = 1 << 20
Figures = Row


def files_of(run: Run) -> list[Path]:
    """List the shards of the residual stream."""
    return _list_files(Path(str(run.path)) / "resid" / "c")


@cache
def _list_files(folder: Path) -> list[Path]:
    """List the files in a folder, once a process: that takes longer than to read some of them."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def files_of_depth(run: Run) -> list[Path]:
    """List the shards of the middle depth; all of them where shards hold several depths."""
    files = files_of(run)
    depth = str(middle(run))
    return [path for path in files if path.relative_to(str(run.path)).parts[2] == depth] or files


def middle(run: Run) -> int:
    """Return the middle depth, which stands for one depth."""
    return len(run.leads("resid")) // 2


def read(files: list[Path], threads: int = READERS) -> None:
    """Read files from end to end, each thread into one buffer."""

    def read_some(paths: list[Path]) -> None:
        buffer = np.empty(READ_BYTES, np.uint8)
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer.data):
                    pass

    with ThreadPoolExecutor(threads) as executor:
        list(executor.map(read_some, [files[i::threads] for i in range(threads)]))


def case_raw(run: Run, threads: int, memory: int) -> Figures:
    """Read every shard."""
    read(files_of(run))
    return {}


def case_norms(run: Run, threads: int, memory: int) -> Figures:
    """Norms and consecutive cosines of all depths, in one pass."""
    from headwater.analysis.measures.norms import norms

    return {"consecutive": norms(run, scan=_scan(threads, memory)).consecutive[0].values.tolist()}


def case_cosine(run: Run, threads: int, memory: int) -> Figures:
    """Every variant of the cosine of every pair of depths, in two passes."""
    from headwater.analysis.measures.cosine import cosine

    got = cosine(run, cka=None, scan=_scan(threads, memory))
    raw = got.consecutive.sel(centring="raw", positions="all", outliers="in")
    return {"consecutive": raw.values.tolist(), "reads": 2}


def case_svd(run: Run, threads: int, memory: int) -> Figures:
    """Exact SVD of one depth, every variant, in float64."""
    from headwater.analysis.measures.svd import svd

    got = svd(run, at=[middle(run)], k=K, scan=_scan(threads, memory))
    sigma = got.singular_value.sel(centring="centred", positions="all").values[0, :K]
    n_rows = run.manifest.n_sequences * run.manifest.n_positions
    flops = 2 * n_rows * run["resid"].shape[-1] ** 2
    return {"sigma": sigma.tolist(), "flops": flops, "share": 1 / len(run.leads("resid"))}


def case_stream(run: Run, threads: int, memory: int) -> Figures:
    """Shuffled batches of all depths."""
    for _ in headwater.stream(run, "resid", 4096, at=run.leads("resid"), buffer_bytes=memory // 2):
        pass
    return {}


def case_stream_one(run: Run, threads: int, memory: int) -> Figures:
    """Shuffled batches of one depth."""
    for _ in headwater.stream(run, "resid", 4096, at=middle(run), buffer_bytes=memory // 4):
        pass
    return {"share": 1 / len(run.leads("resid"))}


def case_raw_one(run: Run, threads: int, memory: int) -> Figures:
    """Read the shards of one depth."""
    read(files_of_depth(run))
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
    return {
        "sigma": sigma.compute(num_workers=threads).tolist(),
        "share": 1 / len(run.leads("resid")),
    }


def case_dask_norms(run: Run, threads: int, memory: int) -> Figures:
    """dask's norms and consecutive cosines of all depths."""
    da: Any = import_module("dask.array")
    x = _dask(run).astype(np.float32)
    norm = da.sqrt((x * x).sum(-1))
    cosine = ((x[1:] * x[:-1]).sum(-1) / (norm[1:] * norm[:-1])).mean((1, 2))
    means, _ = da.compute(cosine, norm.mean((1, 2)), num_workers=threads)
    return {"consecutive": means.tolist()}


CASES: dict[str, Callable[[Run, int, int], Figures]] = {
    "raw read": case_raw,
    "norms": case_norms,
    "dask norms": case_dask_norms,
    "stream, all depths": case_stream,
    "raw read, one depth": case_raw_one,
    "stream, one depth": case_stream_one,
    "raw read, one depth, cached": case_raw_one,
    "stream, one depth, cached": case_stream_one,
    "svd": case_svd,
    "scikit-learn IncrementalPCA": case_sklearn,
    "dask svd_compressed": case_dask_svd,
    "cosine": case_cosine,
}


def _scan(threads: int, memory: int) -> Any:
    from headwater.analysis.engine.scan import Scan

    return Scan(workers=threads, memory=memory)


def _dask(run: Run) -> Any:
    import zarr

    return import_module("dask.array").from_zarr(zarr.open_array(str(run.path / "resid"), mode="r"))
