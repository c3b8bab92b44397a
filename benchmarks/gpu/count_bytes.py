"""Count the bytes that one launch moves, under Triton's interpreter; `python -m headwater.benchmarks.gpu.count_bytes`.

The interpreter is chosen before Triton is imported, so this is a program of its own: it prints one JSON line a case.
What is counted is every address that a load or store touches, in sectors of 32 bytes. `read` counts a sector once a
launch: what is read again comes from the L2 cache, as `l2_read` says. `written` counts what is stored, every time, and
whole sectors where they are more: parts of one sector meet in the L2 cache.
"""
# mypy: ignore-errors

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import torch
from triton.runtime import interpreter

from headwater.benchmarks.gpu.kernels_static import NEEDS_POINTERS, SQUARE, minimum
from headwater.kernels.gpu.column_mass import plan_column_mass
from headwater.kernels.gpu.launch import lookup
from headwater.kernels.gpu.pattern import plan_pattern
from headwater.kernels.gpu.program import Launch
from headwater.kernels.gpu.residual import plan_residual
from headwater.kernels.gpu.row_statistics import plan_statistics

SECTOR = 32
N_POSITIONS = 256
N_HEAD = 2
EDGE = 128
RESIDUAL_ROWS = 64


class Counter:
    """Count what loads and stores touch while it is active; masked elements are left out."""

    def __init__(self) -> None:
        self._read: set[int] = set()
        self._written: set[int] = set()
        self.l2_read = self._stored = 0

    def __enter__(self) -> Counter:
        self._builder = type(interpreter.interpreter_builder)
        self._before = self._builder.create_masked_load, self._builder.create_masked_store
        load, store = self._before

        def create_masked_load(builder, pointers, mask, *rest, **named):
            sectors = _sectors(pointers, mask)
            self.l2_read += SECTOR * len(sectors)
            self._read.update(sectors.tolist())
            return load(builder, pointers, mask, *rest, **named)

        def create_masked_store(builder, pointers, value, mask, *rest):
            self._written.update(_sectors(pointers, mask).tolist())
            self._stored += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
            return store(builder, pointers, value, mask, *rest)

        self._builder.create_masked_load = create_masked_load
        self._builder.create_masked_store = create_masked_store
        return self

    def __exit__(self, *_: object) -> None:
        self._builder.create_masked_load, self._builder.create_masked_store = self._before

    @property
    def read(self) -> int:
        """Bytes of the sectors that were read at least once."""
        return SECTOR * len(self._read)

    @property
    def written(self) -> int:
        """Bytes stored, a value that is stored twice twice, or whole sectors where these are more."""
        return max(SECTOR * len(self._written), self._stored)


def _sectors(pointers, mask) -> np.ndarray:
    size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
    first = pointers.data[mask.data.astype(bool)].astype(np.int64)
    return np.unique(np.concatenate([first // SECTOR, (first + size - 1) // SECTOR]))


def make_launch(
    kernel: str,
    arch: str,
    d_head: int,
    dtype: torch.dtype,
    square: bool = False,
    n_positions: int = N_POSITIONS,
    pointers: bool = False,
) -> Launch:
    """Prepare a launch of GPT-2's layout on real tensors; `d_head` is d_model in the residual kernel."""
    config = lookup(kernel, arch, d_head, 32 if dtype == torch.float32 else 16)
    config = replace(config, tma=config.tma and not pointers)
    make = torch.Generator().manual_seed(0)
    if kernel == "residual":
        x, delta, previous, w, b = (
            torch.randn(n, d_head, generator=make).to(dtype)
            for n in (RESIDUAL_ROWS, RESIDUAL_ROWS, RESIDUAL_ROWS, 1, 1)
        )
        return plan_residual(
            x,
            delta,
            w[0],
            b[0],
            epsilon=1e-5,
            previous=previous,
            out=torch.empty_like(x),
            slot=torch.empty_like(x, dtype=torch.float16),
            config=config,
        )
    fused = torch.randn(1, n_positions, 3, N_HEAD, d_head, generator=make).to(dtype)
    q, k, v = fused.unbind(2)
    start = torch.zeros(1, n_positions, dtype=torch.int32)
    if kernel == "pattern":
        kept = torch.float16
        if dtype == torch.float32:
            kept = torch.float32
        edge = EDGE
        if square:
            edge = -1
        return plan_pattern(
            q, k, v, scale=0.125, row_start=start, edge=edge, pattern_dtype=kept, config=config
        )
    if kernel == "column":
        lse = torch.zeros(1, N_HEAD, n_positions)
        return plan_column_mass(q, k, lse, scale=0.125, row_start=start, config=config)
    return plan_statistics(
        q,
        k,
        v,
        scale=0.125,
        row_start=start,
        statistics=kernel == "statistics",
        features=None,
        config=config,
    )


def count(launch: Launch) -> dict[str, int]:
    """Run a launch under the interpreter and return the bytes that it moves."""
    with Counter() as counter:
        launch.run()
    return {
        "read": counter.read,
        "written": counter.written,
        "l2_read": counter.l2_read,
        "moved": counter.read + counter.written,
        "minimum": minimum(launch),
    }


def main() -> int:
    """Read cases, JSON lists [kernel, arch, d_head, dtype, variant], from standard input; print a JSON line each."""
    from headwater.benchmarks.gpu.naive_kernels import VARIANTS, vary

    for line in sys.stdin:
        kernel, arch, d_head, dtype, variant = json.loads(line)
        launch = make_launch(
            kernel,
            arch,
            d_head,
            getattr(torch, dtype),
            variant == SQUARE,
            pointers=variant in NEEDS_POINTERS,
        )
        if variant in VARIANTS.get(kernel, {}):
            launch = vary(launch, kernel, variant)
        with np.errstate(all="ignore"):
            print(json.dumps(count(launch)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
