"""Which block sizes a kernel runs with: a pinned table by device, kernel, head size and type; no tuning at run time.

On sm_90 the rows of the pattern, and of every kernel in 16 bits at d_head 64, are the fastest of some 50 candidates on
an H100: `python -m headwater.benchmarks kernels --retune`. The others follow what the compiler reports, not the clock:
`python -m headwater.benchmarks.gpu.aot --choose` proposes the largest blocks that don't spill and fit a multiprocessor
twice; rows were corrected by hand where the whole sweep found a spill; the other rows of sm_100 are those that sm_90
began with, those of gfx942 copy sm_80 with one stage. benchmarks/results/kernels_aot.csv says what each compiles to.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version

import torch

from headwater.kernels.gpu.table import TABLE

ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")
HEAD_SIZES = (64, 128, 256)
MAX_HEAD = 256
TRITON_TYPES = (torch.float16, torch.bfloat16, torch.float32)
RESIDUAL_ROWS_INTERPRETED = 16


@dataclass(frozen=True)
class Config:
    """One row of the table: block sizes, warps, pipeline stages, a register cap (CUDA only), the descriptor path.

    `block_m` counts queries (rows, in the residual kernel), `block_n` keys.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    maxnreg: int | None = None
    tma: bool = False


def parse(text: str) -> Config:
    """Read a row such as "128x32 w8 s2 tma" or "64x64 w4 s2 r128" (r: register cap)."""
    found = re.fullmatch(r"(\d+)x(\d+) w(\d+) s(\d+)(?: r(\d+))?( tma)?", text)
    if not found:
        raise ValueError(
            f"{text!r} is no row of the launch table; expected, for example, '128x32 w8 s2 tma'"
        )
    m, n, warps, stages, cap, tma = found.groups()
    return Config(
        int(m), int(n), int(warps), int(stages), int(cap) if cap else None, tma is not None
    )


def identity() -> str:
    """Name what decides the last bits of the kernels: Triton's version, and a digest of the launch table."""
    try:
        compiler = f"triton {version('triton')}"
    except PackageNotFoundError:
        return "torch"
    rows = sorted((str(key), sorted(row.items())) for key, row in TABLE.items())
    return f"{compiler}, table {sha256(repr(rows).encode()).hexdigest()[:12]}"


def arch_of(device: torch.device) -> str:
    """Return the row of the table that serves a device; the interpreter, on CPU tensors, takes that of sm_90."""
    if device.type == "cpu":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    # What has no row of its own, consumer cards among it, takes the oldest.
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


@cache
def lookup(kernel: str, arch: str, width: int, bits: int) -> Config:
    """Return the pinned configuration for `width`, which is d_head (rounded up), or d_model in the residual kernel."""
    if kernel == "residual":
        warps = 8
        if width <= 1024:
            warps = 4
        return Config(1, 0, warps, 1)
    row = TABLE[arch, kernel, bits]
    return parse(row[min(size for size in row if size >= width)])


def choose(kernel: str, device: torch.device, width: int, dtype: torch.dtype) -> Config:
    """Return the configuration of a launch on `device`."""
    bits = 16
    if dtype == torch.float32:
        bits = 32
    config = lookup(kernel, arch_of(device), width, bits)
    if kernel == "residual" and device.type == "cpu":
        return Config(RESIDUAL_ROWS_INTERPRETED, 0, config.warps, config.stages)
    return config
