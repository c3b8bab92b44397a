"""The benchmarks by name: where each lives, and what it measures."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
BENCHMARKS = {
    "analysis": (
        "bench_analysis",
        "analyses and streams: memory, reading and GEMM rate, beside dask and scikit-learn",
    ),
    "extract": ("bench_extract", "extraction to disk against forward passes that capture nothing"),
    "faults": (
        "bench_faults",
        "kills, failing disks, lost power, damaged files, spoiled inputs and load: what holds",
    ),
    "fuzz": (
        "bench_fuzz",
        "every parser of foreign files handed spoiled inputs: no traceback, no code run, bounded",
    ),
    "gpu": (
        "gpu.bench_gpu",
        "extraction on a GPU to disk against forward passes that capture nothing",
    ),
    "inverted": (
        "training.train_inverted_heads",
        "toy models whose two heads must rank tokens in opposite orders",
    ),
    "peers": (
        "peers.bench_peers",
        "the same captures by transformers, TransformerLens, nnsight, SAELens and Headwater",
    ),
    "survive": (
        "peers.bench_survive",
        "what is left of captures that are killed, and what running them again does",
    ),
    "store": (
        "storage.bench_store",
        "write, stream and pick from one array: Headwater, zarr-python, zarrs, tensorstore, h5py …",
    ),
    "kernels": (
        "gpu.bench_kernels",
        "the kernels on a GPU against eager, SDPA and flash; --static without a GPU",
    ),
    "serve": (
        "bench_serve",
        "a server: 200 readers beside a job, 20 kills, a run of 100 GB opened",
    ),
    "shard": ("storage.bench_shard", "the shard writer against raw writes and other libraries"),
    "ledger": (
        "storage.bench_ledger",
        "opening a ledger of a million entries, and planning as many blocks",
    ),
    "plateau": (
        "bench_plateau",
        "a plateau sweep against plain forward passes over as many positions",
    ),
    "start": ("bench_start", "how long the command line, the import and a tiny run take to start"),
    "truth": (
        "bench_truth",
        "analyses on planted truths and simulated nulls: what is found of what is there, and what is not",
    ),
    "versions": (
        "bench_versions",
        "the tests with the oldest versions that are allowed and with the newest, on several Pythons",
    ),
    "workers": (
        "bench_workers",
        "two Ray workers against one, and what a block costs beside its own work",
    ),
}
_STORE = ("tests/store/test_shard.py", "tests/store/test_readers.py")
# What must pass in a commit before its figures are compared with others.
TESTS = {
    "extract": ("tests/extractor/test_model.py", "tests/kernels/test_cpu.py", *_STORE),
    "shard": _STORE,
    "store": _STORE,
}


def load(name: str) -> Callable[[list[str]], int]:
    """Return a benchmark's main function."""
    main: Callable[[list[str]], int] = import_module(
        f"headwater.benchmarks.{BENCHMARKS[name][0]}"
    ).main
    return main
