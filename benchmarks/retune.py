"""Time the candidates of every row of the launch table on this GPU, and write the fastest into the table."""
# mypy: ignore-errors

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import torch

from headwater.kernels import launch_table
from headwater.kernels.launch import HEAD_SIZES, Config, arch_of, parse

TABLE = Path(launch_table.__file__)
Timer = Callable[[str, int, torch.dtype, Config], float]
DEEPER = ((128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 2), (128, 64, 4, 3),
          (128, 32, 4, 2), (128, 32, 4, 3), (128, 32, 8, 3), (64, 128, 4, 2), (64, 128, 8, 2), (64, 64, 4, 1),
          (64, 64, 4, 3), (64, 64, 8, 2), (64, 32, 4, 3))
DEEPER_COLUMNS = ((64, 128, 8, 3), (64, 128, 4, 2), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3), (64, 64, 8, 2),
                  (32, 128, 4, 2), (32, 128, 8, 3), (32, 64, 4, 3))


def show(config: Config) -> str:
    """Return a configuration as a row of the table writes it."""
    text = f"{config.block_m}x{config.block_n} w{config.warps} s{config.stages}"
    return text + (f" r{config.maxnreg}" if config.maxnreg else "") + " tma" * config.tma


def pick(kernel: str, size: int, dtype: torch.dtype, candidates: list[Config], timer: Timer) -> Config:
    """Return the fastest candidate; one that does not compile or run loses."""
    times = {}
    for config in candidates:
        try:
            times[config] = timer(kernel, size, dtype, config)
        except Exception as error:
            print(f"  {kernel} {size} {show(config)}: {str(error).splitlines()[0]}", flush=True)
    if not times:
        raise RuntimeError(f"no candidate of {kernel}, d_head {size}, {dtype} runs on this device")
    ranked = sorted(times, key=lambda config: times[config])
    print(f"{kernel} {size} {dtype}: " + ", ".join(f"{show(c)} {times[c]:.4f}" for c in ranked[:4]), flush=True)
    return ranked[0]


def write_rows(rows: dict[tuple[str, str, int], dict[int, str]], path: Path = TABLE) -> None:
    """Replace rows of the table's file, the others and the text around them stay; raise ValueError for a new row."""
    text = path.read_text("utf-8")
    for (arch, kernel, bits), sizes in rows.items():
        inside = ", ".join(f'{size}: "{show(parse(config))}"' for size, config in sizes.items())
        line = f'    ("{arch}", "{kernel}", {bits}): {{{inside}}},'
        text, n = re.subn(rf'^    \("{arch}", "{kernel}", {bits}\): \{{.*\}},$', line, text, flags=re.M)
        if n != 1:
            raise ValueError(f"{path.name} has {n} rows for {arch}, {kernel}, {bits} bits; expected one")
    path.write_text(text, "utf-8")


def candidates_of(kernel: str, bits: int, tma: bool) -> list[Config]:
    """Return what a row is chosen from: blocks that the compiler's choice starts from, and larger and deeper ones."""
    from headwater.benchmarks.aot_cases import CANDIDATES, COLUMN_CANDIDATES, FULL_CANDIDATES

    known = COLUMN_CANDIDATES if kernel == "column" else FULL_CANDIDATES if bits == 32 else CANDIDATES
    deeper = () if bits == 32 else DEEPER_COLUMNS if kernel == "column" else DEEPER
    return [Config(m, n, w, s, tma=described) for (m, n, w, s), described in
            product(dict.fromkeys((*known, *deeper)), (True, False) if tma else (False,))]


def compile_ahead(tasks: Sequence[tuple[str, int, torch.dtype, Config]]) -> None:
    """Compile candidates into Triton's cache, a process for each core; what fails here fails again when it is timed."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, tasks, chunksize=4))


def _compile(task: tuple[str, int, torch.dtype, Config]) -> None:
    try:
        make_launch(*task, "cuda").run()
        torch.cuda.synchronize()
    except Exception:
        return


def retune(sizes: Sequence[int] = HEAD_SIZES, all_bits: Sequence[int] = (16, 32)) -> int:
    """Tune the rows of this device's part of the table for some head sizes and rewrite them."""
    from headwater.benchmarks.aot_cases import KERNELS

    arch = arch_of(torch.device("cuda"))
    dtypes = {16: torch.float16, 32: torch.float32}
    rows = {(kernel, bits): candidates_of(kernel, bits, arch in ("sm_90", "sm_100"))
            for kernel, bits in product(KERNELS, all_bits)}
    compile_ahead([(kernel, size, dtypes[bits], config) for (kernel, bits), candidates in rows.items()
                   for size in sizes for config in candidates])
    found = {}
    for (kernel, bits), candidates in rows.items():
        found[arch, kernel, bits] = dict(launch_table.TABLE[arch, kernel, bits])
        for size in sizes:
            best = pick(kernel, size, dtypes[bits], candidates, time_on_gpu)
            found[arch, kernel, bits][size] = show(best)
    write_rows(found)
    print(f"wrote {TABLE}; compile it with python -m headwater.benchmarks.aot --all --arch {arch}")
    return 0


def time_on_gpu(kernel: str, size: int, dtype: torch.dtype, config: Config) -> float:
    """Return the milliseconds of one launch for 8 sequences of 1024 positions, 12 heads."""
    from triton.testing import do_bench

    launch = make_launch(kernel, size, dtype, config, "cuda")
    return float(do_bench(launch.run, warmup=5, rep=30, return_mode="median"))


def make_launch(kernel: str, size: int, dtype: torch.dtype, config: Config, device: str, n_positions: int = 1024):
    """Prepare a launch of a configuration on random inputs."""
    from headwater.kernels.attention_pattern import plan_pattern
    from headwater.kernels.attention_statistics import plan_statistics
    from headwater.kernels.column_mass import plan_column_mass

    q, k, v = torch.randn(8, n_positions, 3, 12, size, device=device).to(dtype).unbind(2)
    if kernel == "pattern":
        kept = torch.float32 if dtype == torch.float32 else torch.float16
        return plan_pattern(q, k, v, scale=size**-0.5, row_start=None, edge=256, pattern_dtype=kept, config=config)
    if kernel == "column":
        lse = torch.full((8, 12, n_positions), 9.0, device=device)
        return plan_column_mass(q, k, lse, scale=size**-0.5, row_start=None, config=config)
    return plan_statistics(q, k, v, scale=size**-0.5, row_start=None, statistics=kernel == "statistics",
                           features=None, config=config)
