"""What the machine can do at best: raw writes and reads, memory copies, matrix products."""

from __future__ import annotations

import mmap
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from headwater.benchmarks.lib.measure import gemm_rate
from headwater.benchmarks.lib.rows import Row

PIECE = 8 << 20


def limits(folder: Path, megabytes: int = 256, rounds: int = 3) -> list[Row]:
    """Measure every limit; the best of several rounds, in MB/s and GFLOP/s."""
    rows: list[Row] = []
    for name, take in _transfers(folder / "raw", megabytes).items():
        with suppress(OSError):  # a file system without O_DIRECT
            seconds = min(take() for _ in range(rounds))
            rows.append(
                {
                    "limit": name,
                    "rate": round(megabytes * (1 << 20) / 1e6 / seconds),
                    "unit": "MB/s",
                }
            )
    (folder / "raw").unlink()
    for name, dtype, n in (("fp32", torch.float32, 2048), ("bf16", torch.bfloat16, 256)):
        rate = gemm_rate(n, 768, 3072, dtype)
        rows.append(
            {"limit": f"matrix product {name}", "rate": round(rate / 1e9, 1), "unit": "GFLOP/s"}
        )
    return rows


def _transfers(file: Path, megabytes: int) -> dict[str, Callable[[], float]]:
    buffer = mmap.mmap(-1, PIECE)
    buffer.write(np.random.default_rng(0).bytes(PIECE))
    n = max(megabytes * (1 << 20) // PIECE, 1)
    direct = 0
    if sys.platform == "linux":
        direct = os.O_DIRECT

    def timed(flags: int, call: Callable[[int], object], sync: bool = False) -> Callable[[], float]:
        def take() -> float:
            handle = os.open(file, flags, 0o644)
            start = time.perf_counter()
            for _ in range(n):
                call(handle)
            if sync:
                os.fsync(handle)
            seconds = time.perf_counter() - start
            os.close(handle)
            return seconds

        return take

    def copy() -> float:
        start = time.perf_counter()
        for i in range(n):
            target[i % 2].copy_(source[i % 2])
        return time.perf_counter() - start

    source = torch.ones(2, PIECE * 8, dtype=torch.uint8)
    target = torch.zeros(2, PIECE * 8, dtype=torch.uint8)
    new = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    return {
        "write, buffered, fsync": timed(new, lambda h: os.write(h, buffer), sync=True),
        "write, O_DIRECT, fsync": timed(new | direct, lambda h: os.write(h, buffer), sync=True),
        "read, O_DIRECT": timed(os.O_RDONLY | direct, lambda h: os.readv(h, [buffer])),
        "read, page cache": timed(os.O_RDONLY, lambda h: os.readv(h, [buffer])),
        "memory copy": lambda: copy() / 8,
    }
