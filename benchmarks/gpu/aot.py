"""Compile every kernel configuration that the launcher can choose, without a GPU, and read what became of it.

`python -m headwater.benchmarks.gpu.aot --all` compiles everything and writes benchmarks/results/kernels_aot.csv;
`--cover` compiles the covering set of the tests and writes nothing; `--choose` prints the launch table anew. Registers,
spills, stack and shared memory come from the code object, instructions and store widths from its disassembly. Nothing
here is a measurement on a device.
"""
# mypy: ignore-errors

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import triton

from headwater.benchmarks.gpu.aot_cases import (
    blocks_per_multiprocessor,
    choose_table,
    compile_case,
    cover_cases,
    faults,
    table_cases,
)
from headwater.benchmarks.gpu.compiled import TARGETS, Compiled
from headwater.benchmarks.lib.rows import Row
from headwater.benchmarks.registry import RESULTS as RESULTS_FOLDER

RESULTS = RESULTS_FOLDER / "kernels_aot.csv"


def row(case: Any, made: Compiled) -> Row:
    """Return one line of the results."""
    c = case.config
    return {
        "kernel": case.kernel,
        "arch": case.arch,
        "d_head": case.d_head,
        "dtype": str(case.dtype).removeprefix("torch."),
        "path": "descriptors" if c.tma else "pointers",
        "pattern": ("square" if case.square else "tiles") if case.kernel == "pattern" else "",
        "row_start": int(case.masked),
        "block": f"{c.block_m}x{c.block_n}" if c.block_n else str(c.block_m),
        "warps": c.warps,
        "stages": c.stages,
        "registers": made.registers,
        "spills": made.spills,
        "stack": made.stack,
        "shared": made.shared,
        "blocks_per_multiprocessor": blocks_per_multiprocessor(case, made),
        "matrix_instructions": made.matrix,
        "stores_16_byte": made.stores.get(128, 0),
        "stores_tma": made.tma_stores,
        "instructions": made.instructions,
        "faults": "; ".join(faults(case, made)),
        "triton": triton.__version__,
    }


def _write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: list[str] | None = None) -> int:
    """Compile the cases asked for; return 1 where one breaks its budget."""
    parser = argparse.ArgumentParser(
        prog="python -m headwater.benchmarks.gpu.aot", description=__doc__.split("\n\n")[0]
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--all", action="store_true", help="every configuration of the launch table; writes the CSV"
    )
    what.add_argument("--cover", action="store_true", help="the covering set of the tests")
    what.add_argument(
        "--choose", action="store_true", help="choose the launch table anew and print its rows"
    )
    parser.add_argument("--arch", choices=list(TARGETS), help="only this device")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where --all writes")
    options = parser.parse_args(arguments)
    if options.choose:
        for line in choose_table():
            print(line, flush=True)
        return 0
    rows = []
    for case in table_cases() if options.all else cover_cases():
        if options.arch not in (None, case.arch):
            continue
        made = compile_case(case)
        rows.append(row(case, made))
        print(
            f"{case.name}: {made.registers} registers, {made.spills} spills, {made.shared} bytes shared, "
            f"{made.seconds:.1f} s{rows[-1]['faults'] and '; BREAKS ITS BUDGET: ' + rows[-1]['faults']}",
            file=sys.stderr,
            flush=True,
        )
        if options.all:
            _write(options.out, rows)
    return int(any(line["faults"] for line in rows))


if __name__ == "__main__":
    raise SystemExit(main())
