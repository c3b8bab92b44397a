"""The benchmarks by name: where each lives, and what it measures."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

BENCHMARKS = {
    "extract": ("bench_extract", "extraction to disk against forward passes that capture nothing"),
    "inverted": ("train_inverted_heads", "toy models whose two heads must rank tokens in opposite orders"),
    "shard": ("bench_shard", "the shard writer against raw writes and other libraries"),
    "workers": ("bench_workers", "two Ray workers against one, and what a block costs beside its own work"),
}


def load(name: str) -> Callable[[list[str]], int]:
    """Return a benchmark's main function."""
    main: Callable[[list[str]], int] = import_module(f"headwater.benchmarks.{BENCHMARKS[name][0]}").main
    return main
