"""What the kernels cost, without a GPU: instructions of the code, bytes counted by interpreting, a model of time.

A row is one configuration, or a naive variant of one. Times are a roofline model of a named device, never measured: the
largest of the time that bytes, matrix products and each pipe would take alone at their peak rates.
"""
# mypy: ignore-errors

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from headwater.benchmarks.gpu.sass import PIPES, tile_instructions
from headwater.benchmarks.page import put_table
from headwater.benchmarks.registry import RESULTS as RESULTS_FOLDER

RESULTS = RESULTS_FOLDER / "kernels_static.csv"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
N_SEQUENCES = 16
N_POSITIONS = 1024
N_HEAD = 12
SQUARE = "square, not tiles"
VARIED = {
    "pattern": ("a mask in every block", "z first, P afterwards", "addresses by remainder", SQUARE),
    "statistics": ("a mask in every block", "every statistic elementwise"),
}
NEEDS_POINTERS = ("addresses by remainder",)
PRODUCTS = {"pattern": (3, 0), "statistics": (2, 16), "flash": (2, 0), "column": (1, 0)}


@dataclass(frozen=True)
class Device:
    """Peak rates of a device by its data sheet; `cycles` a warp's instruction holds each pipe of a quarter of an SM."""

    name: str
    n_multiprocessors: int
    gigahertz: float
    bytes_per_second: float
    flops_16: float
    flops_tf32: float
    cycles: dict[str, int]


CYCLES = {"fma": 1, "alu": 2, "xu": 8}
DEVICES = {
    "sm_80": Device("A100 SXM 80 GB", 108, 1.41, 2.039e12, 312e12, 156e12, {**CYCLES, "fma": 2}),
    "sm_90": Device("H100 SXM 80 GB", 132, 1.755, 3.35e12, 989e12, 494e12, CYCLES),
    "sm_100": Device("B200 SXM 180 GB", 148, 1.85, 7.7e12, 2250e12, 1125e12, CYCLES),
}


@dataclass(frozen=True)
class Row:
    """One configuration to look at; `variant` names a design choice that is left out."""

    kernel: str
    arch: str
    d_head: int
    dtype: str
    variant: str = ""

    @property
    def request(self) -> str:
        """The line that `count_bytes` reads."""
        return json.dumps([self.kernel, self.arch, self.d_head, self.dtype, self.variant])


def static_rows() -> Iterator[Row]:
    """Yield 16-bit heads of 64 on every device, with naive variants; of sm_100 the pattern and the statistics."""
    for arch in DEVICES:
        for kernel in PRODUCTS if arch != "sm_100" else ("pattern", "statistics"):
            yield Row(kernel, arch, 64, "float16")
            if arch != "sm_100":
                yield from (
                    Row(kernel, arch, 64, "float16", name) for name in VARIED.get(kernel, ())
                )
        if arch != "sm_100":
            yield Row("residual", arch, 768, "float16")


def every_row() -> Iterator[Row]:
    """Yield every head size and type of the launch table on every device, without variants."""
    for arch in DEVICES:
        for kernel in PRODUCTS:
            for dtype in ("float16", "bfloat16", "float32"):
                yield from (Row(kernel, arch, d_head, dtype) for d_head in (64, 128, 256))
        yield from (
            Row("residual", arch, d_model, "float16") for d_model in (768, 1024, 1280, 1600)
        )


def count_all(rows: list[Row]) -> list[dict[str, int]]:
    """Return the bytes that each row moves, counted in a process that interprets Triton."""
    done = subprocess.run(
        [sys.executable, "-m", "headwater.benchmarks.gpu.count_bytes"],
        check=True,
        capture_output=True,
        input="\n".join(row.request for row in rows),
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def minimum(launch: Any) -> int:
    """Return the bytes of every input and output of a launch, once each; tables of our own are no input."""
    inputs = ("q", "k", "v", "row_start", "x", "delta", "previous", "weight", "bias", "out", "slot")
    tensors = [_tensor(launch.arguments.get(name)) for name in inputs]
    if launch.kernel.__name__ == "column_kernel":
        tensors.append(launch.arguments["lse"])
    return sum(x.numel() * x.element_size() for x in (*tensors, *launch.outputs) if x is not None)


def _tensor(value: Any) -> Any:
    return getattr(value, "base", value)


def look_at(row: Row, moved: dict[str, int]) -> dict[str, Any]:
    """Compile a row and return its line of the table."""
    from headwater.benchmarks.gpu.aot_cases import Case, blocks_per_multiprocessor, plan
    from headwater.benchmarks.gpu.compiled import compile_launch
    from headwater.benchmarks.gpu.naive_kernels import VARIANTS, vary
    from headwater.kernels.gpu.launch import lookup

    dtype = getattr(torch, row.dtype)
    config = lookup(row.kernel, row.arch, row.d_head, 32 if dtype == torch.float32 else 16)
    if row.variant in NEEDS_POINTERS:
        config = replace(config, tma=False)
    case = Case(row.kernel, row.arch, row.d_head, dtype, config, square=row.variant == SQUARE)
    launch = plan(case, N_POSITIONS)
    if row.variant in VARIANTS.get(row.kernel, {}):
        launch = vary(launch, row.kernel, row.variant)
    made = compile_launch(launch, row.arch)
    tile = tile_instructions(row.kernel, made.text) or {}
    blocks = blocks_per_multiprocessor(case, made)
    least = minimum(launch) * (
        N_SEQUENCES // 2 if row.kernel != "residual" else N_SEQUENCES * N_POSITIONS // 64
    )
    ratio = moved["moved"] / moved["minimum"]
    line = {
        "kernel": row.kernel,
        "variant": row.variant,
        "arch": row.arch,
        "d_head": row.d_head,
        "dtype": row.dtype,
        "path": "descriptors" if config.tma else "pointers",
        "block": f"{config.block_m}x{config.block_n}" if config.block_n else str(config.block_m),
        "warps": config.warps,
        "stages": config.stages,
        "registers": made.registers,
        "spills": made.spills,
        "blocks_per_multiprocessor": blocks,
        "occupancy": round(blocks * config.warps / 64, 3),
        **{f"tile_{pipe}": tile.get(pipe, "") for pipe in PIPES},
        "tile_total": sum(tile.values()) if tile else "",
        "instructions_per_1024_scores": _density(tile, config),
        "bytes_read": moved["read"],
        "bytes_written": moved["written"],
        "bytes_minimum": moved["minimum"],
        "bytes_ratio": round(ratio, 4),
        "bytes_read_from_l2": moved["l2_read"],
    }
    return line | model_time(row, config, tile, least * ratio)


def model_time(row: Row, config: Any, tile: dict[str, int], n_bytes: float) -> dict[str, Any]:
    """Return the model's microseconds on the row's device, in all and by limit: 16 sequences of 1024, 12 heads."""
    device = DEVICES[row.arch]
    limits = {"bytes": n_bytes / device.bytes_per_second}
    if row.kernel in PRODUCTS:
        rows = config.block_m
        if row.kernel == "column":
            rows = config.block_n
        columns = config.block_n
        if row.kernel == "column":
            columns = config.block_m
        per_plane = sum(-(-(first + rows) // columns) for first in range(0, N_POSITIONS, rows))
        tiles = per_plane * N_SEQUENCES * N_HEAD
        products, extra = PRODUCTS[row.kernel]
        flops = 2 * config.block_m * config.block_n * (products * row.d_head + extra) * tiles
        if row.dtype != "float32":
            rate = device.flops_16
        else:
            rate = device.flops_tf32 / 3
        limits["tensor"] = flops / rate
        second = config.warps / 4 * tiles / (device.n_multiprocessors * device.gigahertz * 1e9)
        limits |= {
            pipe: tile.get(pipe, 0) * cycles * second for pipe, cycles in device.cycles.items()
        }
        limits["issue"] = sum(tile.values()) * second
    bound = max(limits, key=lambda name: limits[name])
    names = ("bytes", "tensor", "issue", *CYCLES)
    return {
        "device": device.name,
        "model_us": round(limits[bound] * 1e6, 1),
        "model_bound": bound,
        **{
            f"model_{name}_us": round(limits[name] * 1e6, 1) if name in limits else ""
            for name in names
        },
    }


def _density(tile: dict[str, int], config: Any) -> float | str:
    """Return a warp's instructions times warps for 1024 scores, so that tiles of any size compare."""
    if tile:
        return round(
            sum(tile.values()) * config.warps * 1024 / (config.block_m * config.block_n), 1
        )
    return ""


def make_table(out: Path = RESULTS, rows: list[Row] | None = None) -> list[dict[str, Any]]:
    """Look at every row, write the CSV as it grows, and return the lines."""
    if rows is None:
        rows = list(static_rows())
    lines = []
    for row, moved in zip(rows, count_all(rows), strict=True):
        lines.append(look_at(row, moved))
        print(show(lines[-1]), flush=True)
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, lines[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
    return lines


def show(line: dict[str, Any]) -> str:
    """Return a line of the table for people."""
    name = f"{line['kernel']} {line['arch']} {line['d_head']} {line['dtype']}"
    return (
        f"{name:34} {line['variant'] or line['block']:28} {line['registers']:4} reg {line['spills']:4} spills "
        f"{line['occupancy']:5.0%} occupied {line['instructions_per_1024_scores'] or '':>7} instr/1024  bytes × "
        f"{line['bytes_ratio']:.3f}  model {line['model_us']:8.1f} µs ({line['model_bound']})"
    )


def render(lines: list[dict[str, Any]]) -> str:
    """Return the table of the documentation, in Markdown."""
    head = (
        "kernel",
        "without",
        "device",
        "d_head",
        "type",
        "block",
        "registers",
        "blocks/SM",
        "instr/1024",
        "bytes ×",
        "model µs",
        "bound",
    )
    names = (
        "kernel",
        "variant",
        "device",
        "d_head",
        "dtype",
        "block",
        "registers",
        "blocks_per_multiprocessor",
        "instructions_per_1024_scores",
        "bytes_ratio",
        "model_us",
        "model_bound",
    )
    rows = [[f"{line[name]}" for name in names] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def write_page(lines: list[dict[str, Any]], page: Path = PAGE) -> None:
    """Put the table into the documentation."""
    put_table(page, "kernels_static", render(lines))


def faults(lines: list[dict[str, Any]]) -> list[str]:
    """Return what breaks the budget of bytes: pattern 1.05, statistics 1.1, residual tap 1.02 times the minimum."""
    budget = {"pattern": 1.05, "statistics": 1.1, "residual": 1.02}
    return [
        f"{show(line)}: more than {budget[line['kernel']]} of the minimum"
        for line in lines
        if not line["variant"] and line["bytes_ratio"] > budget.get(line["kernel"], 9)
    ]
