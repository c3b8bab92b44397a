"""Decide everything before anything runs: geometry, arrays, bytes on disk and in memory, and what cannot fit."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwater.extractor.batch import attention_rows, padded
from headwater.extractor.config import RunConfig
from headwater.extractor.sites import SITES, RequestError, Selection, select
from headwater.extractor.weights import ModelConfig
from headwater.kernels.cpu import STATISTICS
from headwater.store.layout import ArraySpec, make_spec
from headwater.store.writer import ring_bytes

BLOCK_TOKENS = 16384
MICRO_TOKENS = 2048
BASE_BYTES = 640 << 20
COMPUTE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}


@dataclass(frozen=True)
class Geometry:
    """How sequences are grouped: `block` are committed together, `micro` computed together."""

    seq_len: int
    block: int
    micro: int


@dataclass(frozen=True)
class Plan:
    """What a run will be: arrays, bytes and memory, known once the number of sequences is."""

    model: ModelConfig
    selection: Selection
    geometry: Geometry
    arrays: tuple[ArraySpec, ...]
    n_sequences: int
    canonical: dict[str, Any]
    host_bytes: int
    text_bytes: int

    @property
    def n_blocks(self) -> int:
        return -(-self.n_sequences // self.geometry.block)

    @property
    def blocks(self) -> range:
        """The numbers of all blocks."""
        return range(self.n_blocks)

    def array_bytes(self) -> dict[str, int]:
        """Bytes on disk of each array, before a codec."""
        return {spec.name: spec.stored_bytes(self.n_sequences) for spec in self.arrays}

    @property
    def total_bytes(self) -> int:
        """Bytes on disk of the whole run, before a codec."""
        return sum(self.array_bytes().values()) + self.text_bytes


def geometry(config: RunConfig, model: ModelConfig, seq_len: int | None = None) -> Geometry:
    """Fix sequence length, block and micro-batch from the request and the model, never from the run's length."""
    length = seq_len or config.seq_len or model.n_ctx
    if length > model.n_ctx:
        what = "the token rows have" if seq_len else "--seq-len is"
        raise RequestError(
            f"{what} {length} positions, but the model has only {model.n_ctx} (n_ctx). Use "
            f"--seq-len {model.n_ctx} or less."
        )
    block = config.block or _power_of_two(BLOCK_TOKENS // length)
    return Geometry(length, block, min(block, _power_of_two(MICRO_TOKENS // length)))


def make_plan(config: RunConfig, model: ModelConfig, shape: Geometry, n_sequences: int) -> Plan:
    """Plan a run of `n_sequences`; raise RequestError where the request does not fit the model."""
    selection = select(
        model, shape.seq_len, config.requested, config.layers, config.depths, config.heads, config.positions
    )
    if config.top_k > model.d_vocab:
        raise RequestError(f"--top-k is {config.top_k}, but the vocabulary has {model.d_vocab} tokens.")
    arrays = tuple(_spec(site, config, model, selection, shape, n_sequences) for site in selection.sites)
    canonical = config.canonical(selection, shape.seq_len, shape.block)
    host = host_bytes(config, model, selection, shape, arrays)
    text = n_sequences * (8 * shape.seq_len + 32)
    return Plan(model, selection, shape, arrays, n_sequences, canonical, host, text)


def check_resources(plan: Plan, out: Path, already: int = 0) -> None:
    """Refuse a run that the disk or the memory cannot hold, with both numbers."""
    needed, free = plan.total_bytes - already, free_disk(out)
    if needed > free and not any(spec.codec != "none" for spec in plan.arrays):
        raise RequestError(
            f"the run needs {show_bytes(needed)} on disk, but {out} has {show_bytes(free)} free. Ask "
            "for fewer sites, layers or sequences (--preset statistics is about 85 times smaller than "
            "patterns), or choose another --out."
        )
    memory = available_memory()
    if plan.host_bytes > memory:
        raise RequestError(
            f"the run needs {show_bytes(plan.host_bytes)} of memory, but {show_bytes(memory)} are "
            f"available. Use a smaller --block than {plan.geometry.block}, a smaller model, or fewer "
            "sites."
        )


def host_bytes(
    config: RunConfig, model: ModelConfig, selection: Selection, shape: Geometry, arrays: tuple[ArraySpec, ...]
) -> int:
    """Project the peak memory of extraction in one process, in bytes: the sum of what is allocated, rounded up."""
    d, wide, item = model.d_model, padded(shape.seq_len), COMPUTE_BYTES[config.compute]
    n_weights = sum(_size(s) for s in model.shapes().values())
    weights = 4 * n_weights + (item * n_weights if config.compute != "fp32" else 0)
    weights += model.d_vocab * d * (item if config.compute != "fp32" else 0)
    stream = 4 * shape.block * wide * d
    rows = shape.micro * wide
    work = rows * (6 * d * 4 + 3 * d * (4 + item) + 2 * model.d_mlp * item + 2 * d * item)
    queries = attention_rows(shape.seq_len)
    n_attention = model.n_head * queries * wide * 4
    work += 2 * n_attention + (2 * n_attention if set(selection.sites) & set(STATISTICS) else 0)
    work += model.n_head * wide * (2 * model.d_head + 16) * 8 + 8 * 4 * rows * model.n_head
    work += shape.micro * wide * wide * 4
    if {"loss", "top_logits", "top_tokens"} & set(selection.sites):
        work += 512 * model.d_vocab * (12 + item)
    return BASE_BYTES + int(1.1 * (weights + stream + work)) + ring_bytes(arrays)


def free_disk(out: Path) -> int:
    """Return the free bytes of the file system that will hold `out`."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def available_memory() -> int:
    """Return the bytes of memory that can be used without swapping, within the container's limit."""
    try:
        with open("/proc/meminfo") as file:
            table = dict(line.split(":") for line in file)
        free = int(table["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as file, open("/sys/fs/cgroup/memory.current") as used:
            free = min(free, int(file.read()) - int(used.read()))
    except (OSError, ValueError):
        pass
    return free


def show_bytes(n: float) -> str:
    """Write a number of bytes for people: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def _spec(
    name: str, config: RunConfig, model: ModelConfig, selection: Selection, shape: Geometry, n_sequences: int
) -> ArraySpec:
    site = SITES[name]
    dims = tuple(
        "selected_position" if d == "position" and site.group == "vector" and selection.positions is not None else d
        for d in site.dims
    )
    sizes = {
        "layer": len(selection.layers), "depth": len(selection.depths), "head": len(selection.heads),
        "sequence": n_sequences, "position": shape.seq_len, "query": shape.seq_len, "key": shape.seq_len,
        "selected_position": len(selection.positions or ()), "d_model": model.d_model, "d_head": model.d_head,
        "d_mlp": model.d_mlp, "rank": config.top_k,
    }  # fmt: skip
    attributes = {"title": site.title, "transformer_lens": site.alias} if site.alias else {"title": site.title}
    return make_spec(
        name, dims, sizes, config.dtype_of(name), config.codec_of(name), site.fill, shape.block, attributes
    )


def _power_of_two(n: int) -> int:
    return 1 << max(n, 1).bit_length() - 1


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
