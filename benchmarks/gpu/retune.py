"""Time the candidates of every row of the launch table on this GPU, and write the fastest into the table."""
# mypy: ignore-errors

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headwater.kernels.gpu import table as launch_table
from headwater.kernels.gpu.launch import HEAD_SIZES, Config, arch_of, parse

if TYPE_CHECKING:
    from headwater.kernels.gpu.program import Launch

TABLE = Path(launch_table.__file__)
COLUMNS = 100
SPAWN = multiprocessing.get_context("spawn")
DTYPES = {16: torch.float16, 32: torch.float32}
LOG2_E = 1.4426950408889634
Timer = Callable[[str, int, torch.dtype, Config], float]
DEEPER = (
    (128, 128, 8, 2),
    (128, 128, 8, 3),
    (128, 64, 8, 3),
    (128, 64, 8, 4),
    (128, 64, 4, 2),
    (128, 64, 4, 3),
    (128, 32, 4, 2),
    (128, 32, 4, 3),
    (128, 32, 8, 3),
    (64, 128, 4, 2),
    (64, 128, 8, 2),
    (64, 64, 4, 1),
    (64, 64, 4, 3),
    (64, 64, 4, 4),
    (64, 64, 8, 2),
    (64, 32, 4, 3),
    (64, 32, 4, 4),
    (64, 128, 4, 3),
    (64, 128, 8, 3),
)
DEEPER_COLUMNS = (
    (64, 128, 8, 3),
    (64, 128, 4, 2),
    (128, 64, 8, 2),
    (128, 128, 8, 2),
    (64, 64, 4, 3),
    (64, 64, 8, 2),
    (32, 128, 4, 2),
    (32, 128, 8, 3),
    (32, 64, 4, 3),
)


def show(config: Config) -> str:
    """Return a configuration as a row of the table writes it."""
    text = f"{config.block_m}x{config.block_n} w{config.warps} s{config.stages}"
    return text + (f" r{config.maxnreg}" if config.maxnreg else "") + " tma" * config.tma


def pick(
    kernel: str, size: int, dtype: torch.dtype, candidates: list[Config], timer: Timer
) -> Config:
    """Return the fastest candidate; one that does not compile or run loses, and so does its twin with descriptors.

    For a tensor that cannot be described takes the same blocks by pointers.
    """
    times = {}
    for config in candidates:
        try:
            times[config] = timer(kernel, size, dtype, config)
        except Exception as error:
            print(f"  {kernel} {size} {show(config)}: {str(error).splitlines()[0]}", flush=True)
    times = {c: t for c, t in times.items() if not c.tma or replace(c, tma=False) in times}
    if not times:
        raise RuntimeError(f"no candidate of {kernel}, d_head {size}, {dtype} runs on this device")
    ranked = sorted(times, key=lambda config: times[config])
    print(
        f"{kernel} {size} {dtype}: " + ", ".join(f"{show(c)} {times[c]:.4f}" for c in ranked[:4]),
        flush=True,
    )
    return ranked[0]


def write_rows(rows: dict[tuple[str, str, int], dict[int, str]], path: Path = TABLE) -> None:
    """Replace rows of the table's file, the others and the text around them stay; raise ValueError for a new row."""
    text = path.read_text("utf-8")
    for (arch, kernel, bits), sizes in rows.items():
        items = [f'{size}: "{show(parse(config))}"' for size, config in sizes.items()]
        line = f'    ("{arch}", "{kernel}", {bits}): {{{", ".join(items)}}},'
        if len(line) > COLUMNS:  # as `ruff format` lays it out
            inside = "".join(f"        {item},\n" for item in items)
            line = f'    ("{arch}", "{kernel}", {bits}): {{\n{inside}    }},'
        row = rf'^    \("{arch}", "{kernel}", {bits}\): \{{[^{{}}]*\}},$'
        text, n = re.subn(row, line, text, flags=re.M)
        if n != 1:
            raise ValueError(
                f"{path.name} has {n} rows for {arch}, {kernel}, {bits} bits; expected one"
            )
    path.write_text(text, "utf-8")


def candidates_of(kernel: str, bits: int, tma: bool) -> list[Config]:
    """Return what a row is chosen from: blocks that the compiler's choice starts from, and larger and deeper ones."""
    from headwater.benchmarks.gpu.aot_cases import CANDIDATES, COLUMN_CANDIDATES, FULL_CANDIDATES

    known = (
        COLUMN_CANDIDATES if kernel == "column" else FULL_CANDIDATES if bits == 32 else CANDIDATES
    )
    deeper = () if bits == 32 else DEEPER_COLUMNS if kernel == "column" else DEEPER
    return [
        Config(m, n, w, s, tma=described)
        for (m, n, w, s), described in product(
            dict.fromkeys((*known, *deeper)), (True, False) if tma else (False,)
        )
    ]


def retune(
    kernels: Sequence[str], sizes: Sequence[int] = HEAD_SIZES, all_bits: Sequence[int] = (16, 32)
) -> int:
    """Tune rows of this device's part of the table for some head sizes; each is written as soon as it is found."""
    arch = arch_of(torch.device("cuda"))
    rows = {
        (kernel, bits): candidates_of(kernel, bits, arch in ("sm_90", "sm_100"))
        for kernel, bits in product(kernels, all_bits)
    }
    with ProcessPoolExecutor(os.cpu_count(), SPAWN) as pool:
        list(
            pool.map(
                compile_ahead,
                *zip(
                    *(
                        (kernel, size, DTYPES[bits], config)
                        for (kernel, bits), configs in rows.items()
                        for size in sizes
                        for config in configs
                    ),
                    strict=True,
                ),
            )
        )
    timer = Apart(time_on_gpu)
    found = {}
    for (kernel, bits), candidates in rows.items():
        best = {size: show(pick(kernel, size, DTYPES[bits], candidates, timer)) for size in sizes}
        found[arch, kernel, bits] = launch_table.TABLE[arch, kernel, bits] | best
        write_rows(found)
    print(
        f"wrote {TABLE}; compile it with python -m headwater.benchmarks.gpu.aot --all --arch {arch}"
    )
    return 0


def compile_ahead(kernel: str, size: int, dtype: torch.dtype, config: Config) -> None:
    """Compile a candidate into Triton's cache without a launch; what fails here fails again when it is timed."""
    with suppress(Exception):
        launch = make_launch(kernel, size, dtype, config, "cuda")
        launch.kernel.warmup(grid=(launch.grid,), **launch.arguments, **launch.options)


class Apart:
    """Call a timer in a process of its own; one that a fault of the device ends is replaced for the next call."""

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, *arguments: Any) -> float:
        """Time one candidate; raises RuntimeError where it ends the process."""
        self._pool = self._pool or ProcessPoolExecutor(1, SPAWN)
        try:
            return self._pool.submit(self._timer, *arguments).result()
        except BrokenProcessPool:
            self._pool = None
            raise RuntimeError("it broke the device's context") from None


def time_on_gpu(kernel: str, size: int, dtype: torch.dtype, config: Config) -> float:
    """Return the milliseconds of one launch for 8 sequences of 1024 positions, 12 heads.

    Raises RuntimeError for a launch that fails or is wrong, and ends the process where the device is of no more use.
    """
    from triton.testing import do_bench

    try:
        launch = make_launch(kernel, size, dtype, config, "cuda")
        error = error_of(kernel, launch)
        milliseconds = float(do_bench(launch.run, warmup=5, rep=30, return_mode="median"))
    except Exception as failure:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
        raise RuntimeError(str(failure)) from None
    if not error < 1e-2:
        raise RuntimeError(f"wrong by {error:.1e}")
    return milliseconds


def error_of(kernel: str, launch: Launch) -> float:
    """Return the relative error of a launch's first output, and of the sum of its pattern, against torch."""
    first, *others = launch.run()
    q, k = (tensor_of(launch.arguments[name]).transpose(1, 2) for name in ("q", "k"))
    scores = torch.matmul(q.float(), k.float().mT) * (launch.arguments["factor"] / LOG2_E)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    scores.masked_fill_(hidden, -torch.inf)
    if kernel == "column":
        want = torch.exp(scores - launch.arguments["lse"][..., None]).sum(-2)
    else:
        v = tensor_of(launch.arguments["v"]).transpose(1, 2)
        want = torch.matmul(torch.softmax(scores, -1), v.float()).transpose(1, 2)
    error = float((first.float() - want).norm() / want.norm())
    if kernel == "pattern":
        n_rows = others[0].numel()
        error = max(error, abs(float(others[1].sum(dtype=torch.float64)) / n_rows - 1))
    return error


def tensor_of(x: Any) -> torch.Tensor:
    """Return the tensor of an argument, which may be a descriptor."""
    if isinstance(x, torch.Tensor):
        return x
    return x.base


def make_launch(
    kernel: str, size: int, dtype: torch.dtype, config: Config, device: str, n_positions: int = 1024
):
    """Prepare a launch of a configuration on random inputs."""
    from headwater.kernels.gpu.column_mass import plan_column_mass
    from headwater.kernels.gpu.pattern import plan_pattern
    from headwater.kernels.gpu.row_statistics import plan_statistics

    q, k, v = torch.randn(8, n_positions, 3, 12, size, device=device).to(dtype).unbind(2)
    if kernel == "pattern":
        kept = torch.float16
        if dtype == torch.float32:
            kept = torch.float32
        return plan_pattern(
            q, k, v, scale=size**-0.5, row_start=None, edge=256, pattern_dtype=kept, config=config
        )
    if kernel == "column":
        lse = torch.full((8, 12, n_positions), 9.0, device=device)
        return plan_column_mass(q, k, lse, scale=size**-0.5, row_start=None, config=config)
    return plan_statistics(
        q,
        k,
        v,
        scale=size**-0.5,
        row_start=None,
        statistics=kernel == "statistics",
        features=None,
        config=config,
    )
