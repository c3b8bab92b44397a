"""The launches that are compiled ahead of time: examples on the meta device, the covering set, budgets, the chooser."""
# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from headwater.benchmarks.gpu.compiled import Compiled, compile_launch
from headwater.kernels.gpu.column_mass import plan_column_mass
from headwater.kernels.gpu.launch import ARCHES, HEAD_SIZES, Config, lookup
from headwater.kernels.gpu.pattern import plan_pattern
from headwater.kernels.gpu.program import Launch
from headwater.kernels.gpu.residual import plan_residual
from headwater.kernels.gpu.row_statistics import plan_statistics

KERNELS = ("pattern", "statistics", "flash", "column")
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
CANDIDATES = (
    (128, 64, 8, 2),
    (128, 32, 8, 2),
    (64, 64, 4, 2),
    (64, 32, 4, 2),
    (64, 32, 8, 2),
    (64, 32, 8, 1),
    (32, 32, 4, 2),
    (32, 32, 4, 1),
    (32, 16, 4, 1),
    (16, 16, 4, 1),
)
FULL_CANDIDATES = (
    (64, 32, 8, 2),
    (64, 32, 4, 2),
    (32, 32, 4, 2),
    (32, 32, 4, 1),
    (32, 16, 4, 1),
    (16, 16, 4, 1),
)
COLUMN_CANDIDATES = (
    (64, 128, 8, 2),
    (32, 128, 8, 2),
    (64, 64, 4, 2),
    (32, 64, 4, 2),
    (32, 64, 8, 2),
    (32, 64, 4, 1),
    (32, 32, 4, 1),
    (16, 32, 4, 1),
    (16, 16, 4, 1),
)


@dataclass(frozen=True)
class Case:
    """One configuration to compile; `square` asks for the square pattern, `masked` for row starts."""

    kernel: str
    arch: str
    d_head: int
    dtype: torch.dtype
    config: Config
    square: bool = False
    masked: bool = True

    @property
    def name(self) -> str:
        """A short name for tables and test ids."""
        c = self.config
        parts = [
            self.kernel,
            self.arch,
            str(self.d_head),
            str(self.dtype).removeprefix("torch."),
            f"{c.block_m}x{c.block_n} w{c.warps} s{c.stages}" + " tma" * c.tma,
        ]
        return " ".join(parts + ["square"] * self.square + ["causal"] * (not self.masked))


@contextmanager
def building_for(arch: str) -> Iterator[None]:
    """Let the launchers believe that torch was built for AMD while they prepare a launch for gfx942."""
    before = torch.version.hip
    if arch.startswith("gfx"):
        torch.version.hip = "6"
    else:
        torch.version.hip = None
    try:
        yield
    finally:
        torch.version.hip = before


def plan(case: Case, n_positions: int = 1024) -> Launch:
    """Prepare a launch of GPT-2's layout (one fused projection, 12 heads) without any memory."""
    with building_for(case.arch):
        return _plan(case, n_positions)


def _plan(case: Case, n_positions: int) -> Launch:
    if case.kernel == "residual":
        x = torch.empty(64, case.d_head, dtype=case.dtype, device="meta")
        return plan_residual(
            x, x, x[0], x[0], epsilon=1e-5, previous=x, out=x, slot=None, config=case.config
        )
    q, k, v = torch.empty(
        2, n_positions, 3, 12, case.d_head, dtype=case.dtype, device="meta"
    ).unbind(2)
    if case.masked:
        start = torch.empty(2, n_positions, dtype=torch.int32, device="meta")
    else:
        start = None
    if case.kernel == "pattern":
        kept = torch.float16
        if case.dtype == torch.float32:
            kept = torch.float32
        return plan_pattern(
            q,
            k,
            v,
            scale=0.125,
            row_start=start,
            edge=-1 if case.square else 256,
            pattern_dtype=kept,
            config=case.config,
        )
    if case.kernel == "column":
        lse = torch.empty(2, 12, n_positions, device="meta")
        return plan_column_mass(q, k, lse, scale=0.125, row_start=start, config=case.config)
    return plan_statistics(
        q,
        k,
        v,
        scale=0.125,
        row_start=start,
        statistics=case.kernel == "statistics",
        features=None,
        config=case.config,
    )


def compile_case(case: Case) -> Compiled:
    """Compile one case."""
    return compile_launch(plan(case), case.arch)


def blocks_per_multiprocessor(case: Case, made: Compiled) -> int:
    """Return how many blocks registers, shared memory and threads let run at once on one multiprocessor."""
    if case.arch.startswith("gfx"):
        waves = 4 * (512 // max(-(-made.registers // 8) * 8, 1))
        return min(waves // case.config.warps, 65536 // made.shared if made.shared else 32)
    registers = 65536 // (-(-made.registers // 8) * 8 * 32 * case.config.warps)
    shared = {"sm_80": 164, "sm_90": 228, "sm_100": 228}[case.arch] * 1024 // (made.shared + 1024)
    return min(
        registers, shared, (2048 if case.arch != "gfx942" else 2560) // (32 * case.config.warps), 32
    )


def table_cases() -> Iterator[Case]:
    """Yield every configuration that the launcher can choose, the pointer path of descriptor devices included."""
    for arch in ARCHES:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            bits = 16
            if dtype == torch.float32:
                bits = 32
            for kernel in KERNELS:
                for size in HEAD_SIZES:
                    config = lookup(kernel, arch, size, bits)
                    yield Case(kernel, arch, size, dtype, config)
                    if kernel == "pattern":
                        yield Case(kernel, arch, size, dtype, config, square=True)
                    if config.tma:
                        yield Case(kernel, arch, size, dtype, replace(config, tma=False))
                for size in (16, 32, 80):
                    yield Case(kernel, arch, size, dtype, lookup(kernel, arch, size, bits))
                yield Case(kernel, arch, 64, dtype, lookup(kernel, arch, 64, bits), masked=False)
            for width in (768, 1600):
                yield Case("residual", arch, width, dtype, lookup("residual", arch, width, bits))


def cover_cases() -> Iterator[Case]:
    """Yield about twenty cases that touch every kernel, device, path and type."""
    half = torch.float16
    bfloat = torch.bfloat16
    full = torch.float32
    wanted = [("pattern", arch, 64, half) for arch in ARCHES]
    wanted += [("statistics", arch, 64, half) for arch in ARCHES]
    wanted += [("column", arch, 64, half) for arch in ("sm_80", "sm_90", "gfx942")]
    wanted += [
        ("pattern", "sm_90", 128, bfloat),
        ("statistics", "sm_90", 128, bfloat),
        ("flash", "sm_90", 64, half),
        ("pattern", "sm_90", 64, full),
        ("pattern", "sm_80", 80, bfloat),
        ("residual", "sm_90", 768, half),
        ("residual", "gfx942", 1600, full),
    ]
    for kernel, arch, size, dtype in wanted:
        yield Case(
            kernel, arch, size, dtype, lookup(kernel, arch, size, 32 if dtype == full else 16)
        )
    config = lookup("pattern", "sm_90", 64, 16)
    yield Case("pattern", "sm_90", 64, half, replace(config, tma=False))
    yield Case("pattern", "sm_90", 64, half, config, square=True)


def faults(case: Case, made: Compiled) -> list[str]:
    """Return what breaks the budget of a case, as sentences; an empty list is a pass.

    float16 and bfloat16 with heads up to 128: no spill, no stack. Every kernel with products: matrix instructions.
    Pattern: stored by 16 bytes or by descriptors, and at d_head = 64 two blocks on a multiprocessor. Shared memory
    within the smallest device of the row.
    """
    found = []
    narrow = case.dtype != torch.float32 and case.d_head <= 128
    primary = case.config.tma or not case.arch.startswith(("sm_90", "sm_100"))
    if case.kernel != "residual" and narrow and primary and (made.spills or made.stack):
        found.append(
            f"{made.spills} spill instructions and {made.stack} bytes of stack, expected none"
        )
    if case.kernel != "residual" and not made.matrix:
        found.append("no matrix instruction")
    if made.shared > SHARED_LIMIT[case.arch]:
        found.append(
            f"{made.shared} bytes of shared memory, the device has {SHARED_LIMIT[case.arch]}"
        )
    if case.kernel == "pattern":
        if case.config.tma and not made.tma_stores:
            found.append("the pattern isn't stored by descriptors")
        if not case.config.tma and not case.square and not made.stores.get(128):
            found.append(f"no 16-byte store, only {made.stores}")
        blocks = blocks_per_multiprocessor(case, made)
        if case.d_head == 64 and narrow and primary and blocks < 2:
            found.append(f"{blocks} block on a multiprocessor, expected 2")
    return found


def choose_row(kernel: str, arch: str, size: int, bits: int) -> str:
    """Return the first candidate that doesn't spill and fits a multiprocessor twice (once for wide heads), else the one
    that spills least.
    """
    dtype = torch.float16
    if bits == 32:
        dtype = torch.float32
    best: tuple[tuple[int, int], str] | None = None
    candidates = (
        COLUMN_CANDIDATES if kernel == "column" else FULL_CANDIDATES if bits == 32 else CANDIDATES
    )
    for m, n, warps, stages in candidates:
        if m * n * size > (2**17 if bits == 32 else 2**20):
            continue
        tma = arch in ("sm_90", "sm_100")
        case = Case(
            kernel,
            arch,
            size,
            dtype,
            Config(m, n, warps, 1 if arch == "gfx942" else stages, tma=tma),
        )
        text = f"{m}x{n} w{warps} s{case.config.stages}" + " tma" * tma
        try:
            made = compile_case(case)
        except Exception as error:
            print(f"  {case.name}: {str(error).splitlines()[0]}", flush=True)
            continue
        if made.shared > SHARED_LIMIT[arch]:
            continue
        blocks = blocks_per_multiprocessor(case, made)
        if not made.spills and not made.stack and blocks >= (2 if size < 256 else 1):
            return text
        rank = (made.spills + made.stack, -blocks)
        if best is None or rank < best[0]:
            best = (rank, text)
    if best is None:
        raise RuntimeError(
            f"no candidate compiles for {kernel} on {arch}, d_head {size}, {bits} bits"
        )
    return best[1]


def choose_table() -> Iterator[str]:
    """Yield the lines of `kernels/gpu/table.py` anew."""
    for arch in ARCHES:
        for kernel in KERNELS:
            for bits in (16, 32):
                row = {size: choose_row(kernel, arch, size, bits) for size in HEAD_SIZES}
                parts = ", ".join(f'{size}: "{text}"' for size, text in row.items())
                yield f'    ("{arch}", "{kernel}", {bits}): {{{parts}}},'
