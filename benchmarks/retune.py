"""Time the candidates of every row of the launch table on this GPU, and write the fastest into the table."""
# mypy: ignore-errors

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from headwater.kernels import launch_table
from headwater.kernels.launch import HEAD_SIZES, Config, arch_of, parse

TABLE = Path(launch_table.__file__)
Timer = Callable[[str, int, torch.dtype, Config], float]


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
    return min(times, key=lambda config: times[config])


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


def retune() -> int:
    """Tune every row of this device's part of the table and rewrite it."""
    from headwater.benchmarks.aot_cases import CANDIDATES, COLUMN_CANDIDATES, FULL_CANDIDATES, KERNELS

    arch = arch_of(torch.device("cuda"))
    rows = {}
    for kernel in KERNELS:
        for bits, dtype in ((16, torch.float16), (32, torch.float32)):
            blocks = COLUMN_CANDIDATES if kernel == "column" else FULL_CANDIDATES if bits == 32 else CANDIDATES
            candidates = [Config(m, n, w, s, tma=tma) for m, n, w, s in blocks
                          for tma in ((True, False) if arch in ("sm_90", "sm_100") else (False,))]
            rows[arch, kernel, bits] = {}
            for size in HEAD_SIZES:
                best = pick(kernel, size, dtype, candidates, time_on_gpu)
                rows[arch, kernel, bits][size] = show(best)
                print(f"{arch} {kernel} {bits} bits, d_head {size}: {show(best)}", flush=True)
    write_rows(rows)
    print(f"wrote {TABLE}; compile it with python -m headwater.benchmarks.aot --all --arch {arch}")
    return 0


def time_on_gpu(kernel: str, size: int, dtype: torch.dtype, config: Config) -> float:
    """Return the milliseconds of one launch for 8 sequences of 1024 positions, 12 heads."""
    from triton.testing import do_bench

    launch = make_launch(kernel, size, dtype, config, "cuda")
    return float(do_bench(launch.run))


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
