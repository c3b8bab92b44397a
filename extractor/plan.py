"""Decide everything before anything runs: geometry, arrays, bytes on disk and in memory, and what cannot fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from headwater.extractor.edits.grammar import REFERENCE, Edit
from headwater.extractor.edits.places import place_edits
from headwater.extractor.machine import available_memory as available_memory
from headwater.extractor.model.batch import attention_rows, logit_rows, padded
from headwater.extractor.model.transfer import ring_capacity
from headwater.extractor.model.weights import ModelConfig
from headwater.extractor.request import RunConfig
from headwater.extractor.selection import Selection, select
from headwater.extractor.sites import SITES, RequestError, parse_site
from headwater.extractor.units import show_bytes
from headwater.kernels.cpu.rows import STATISTICS
from headwater.store.layout import ArraySpec, make_spec, sequence_bytes
from headwater.store.manifest import PLAIN_CHUNK_BYTES
from headwater.store.place import PlaceLike, place_of
from headwater.store.writer import ring_bytes

BLOCK_TOKENS = 16384
MICRO_TOKENS = 2048
WIDE_BYTES = 256 << 20
GPU_WIDE_BYTES = 2 << 30
GPU_BLOCK_TOKENS = 131072
GPU_MICRO_TOKENS = 65536
BASE_BYTES = 640 << 20
METADATA_BYTES = 4096
ENDLESS = 1 << 62
COMPUTE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}


@dataclass(frozen=True)
class Geometry:
    """How sequences are grouped: `block` are committed together, `micro` computed together."""

    seq_len: int
    block: int
    micro: int


@dataclass(frozen=True)
class Plan:
    """What a run will be: arrays, bytes and memory, known once the number of sequences is.

    `host_bytes` is the memory of all processes on this machine or, where the blocks are computed `elsewhere`, on a
    cluster, that of one of its workers.
    `notes` are what a reader should know of the checkpoint.
    `text` says of its text, where that was read for the plan, what the manifest keeps (`Source.describe`).
    """

    model: ModelConfig
    selection: Selection
    geometry: Geometry
    arrays: tuple[ArraySpec, ...]
    n_sequences: int
    canonical: dict[str, Any]
    host_bytes: int
    text_bytes: int
    edits: tuple[Edit, ...] = ()
    elsewhere: bool = False
    notes: tuple[str, ...] = ()
    text: dict[str, Any] = field(default_factory=dict)

    @property
    def n_blocks(self) -> int:
        return -(-self.n_sequences // self.geometry.block)

    @property
    def blocks(self) -> range:
        """The numbers of all blocks."""
        return range(self.n_blocks)

    def array_bytes(self) -> dict[str, int]:
        """Bytes on disk of each array, shard indexes included, before a codec."""
        return {spec.name: spec.stored_bytes(self.n_sequences) for spec in self.arrays}

    @property
    def total_bytes(self) -> int:
        """Bytes on disk of the whole run, before a codec; tokenizer and table of documents are left out."""
        return sum(self.array_bytes().values()) + self.text_bytes

    @property
    def certain_bytes(self) -> int:
        """Bytes on disk that no codec can make fewer."""
        sizes = self.array_bytes()
        return self.text_bytes + sum(
            sizes[spec.name] for spec in self.arrays if spec.codec == "none"
        )

    def heaviest(self) -> tuple[list[str], float]:
        """Name the largest arrays that together make up half of the bytes, and their share."""
        sizes = self.array_bytes()
        total = self.total_bytes
        names = list[str]()
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            names.append(name)
            if sum(sizes[n] for n in names) >= total / 2:
                break
        return names, sum(sizes[n] for n in names) / total


def geometry(config: RunConfig, model: ModelConfig, seq_len: int | None = None) -> Geometry:
    """Fix sequence length, block and micro-batch from the request and the model, never from the run's length."""
    length = seq_len or config.seq_len or model.n_ctx
    if length > model.n_ctx:
        raise RequestError(
            f"the rows of --tokens have {length} positions, but the model has only {model.n_ctx} (n_ctx). Cut "
            f"them, or make windows over them with --stride {model.n_ctx}."
            if seq_len
            else f"--seq-len is {length}, but the model has only {model.n_ctx} positions (n_ctx). Use {model.n_ctx} or "
            "less; longer documents are cut into rows."
        )
    tokens, micro = (
        (BLOCK_TOKENS, MICRO_TOKENS)
        if config.device == "cpu"
        else (GPU_BLOCK_TOKENS, GPU_MICRO_TOKENS)
    )
    names = [parse_site(name)[0] for name in config.requested]
    for n_bytes in wide_values(names, model).values():
        micro = min(micro, (WIDE_BYTES if config.device == "cpu" else GPU_WIDE_BYTES) // n_bytes)
    block = config.block or _power_of_two(tokens // length)
    return Geometry(length, block, min(block, _power_of_two(micro // length)))


def wide_values(sites: Sequence[str], model: ModelConfig) -> dict[str, int]:
    """Return the bytes a token, in float32, of those sites whose values dwarf a model's other ones."""
    wide = {"logits": 4 * model.d_vocab, "attn_result": 4 * model.n_head * model.d_model}
    return {site: n_bytes for site, n_bytes in wide.items() if site in sites}


def make_plan(config: RunConfig, model: ModelConfig, shape: Geometry, n_sequences: int) -> Plan:
    """Plan a run of `n_sequences`; raise RequestError where the request does not fit the model."""
    selection = select(
        model,
        shape.seq_len,
        config.requested,
        config.layers,
        config.depths,
        config.heads,
        config.positions,
    )
    if {"top_logits", "top_tokens"} & set(selection.sites) and config.top_k > model.d_vocab:
        raise RequestError(
            f"--top-k is {config.top_k}, but the vocabulary has {model.d_vocab} tokens."
        )
    edits = tuple(edit for edit in config.edits if isinstance(edit, Edit))
    place_edits(edits, model, shape.seq_len)
    if edits and config.device != "cpu":
        raise RequestError(
            f"--edit {str(edits[0])!r} with --device {config.device}: edits change the forward of the CPU only. Leave "
            "--device out."
        )
    arrays = tuple(
        _spec(site, config, model, selection, shape, n_sequences) for site in selection.sites
    )
    canonical = config.canonical(selection, shape.seq_len, shape.block)
    host = host_bytes(config, model, selection, shape, arrays)
    if config.workers and config.ray is None:
        host = (
            host * config.workers + BASE_BYTES + 4 * sum(prod(s) for s in model.shapes().values())
        )
    text = text_bytes(arrays, shape, n_sequences)
    return Plan(
        model=model,
        selection=selection,
        geometry=shape,
        arrays=arrays,
        n_sequences=n_sequences,
        canonical=canonical,
        host_bytes=host,
        text_bytes=text,
        edits=edits,
        elsewhere=config.ray is not None,
    )


def text_bytes(arrays: tuple[ArraySpec, ...], shape: Geometry, n_sequences: int) -> int:
    """Project the bytes of what is not an activation: tokens and the like, `complete`, metadata, the ledger."""
    n_blocks = -(-n_sequences // shape.block)
    total = 0
    for width in (4 * shape.seq_len, 4 * shape.seq_len, 4, 8, 8):
        rows = min(max(PLAIN_CHUNK_BYTES // width, 1), n_sequences)
        total += -(-n_sequences // rows) * (rows * width + 4)
    shards = sum(len(spec.block_shards(0, min(shape.block, n_sequences))) for spec in arrays)
    return (
        total
        + n_blocks * (shape.block + 4 + 512 + 80 * shards)
        + METADATA_BYTES * (16 + len(arrays))
    )


def check_resources(plan: Plan, out: PlaceLike, done: float = 0.0, at_least: bool = False) -> None:
    """Refuse a run that the disk or the memory cannot hold, with both numbers; `done` is the share that is there.

    `at_least` says that the plan is a lower bound, made before the sequences are counted.

    An array with a codec does not count, since nobody knows what is left of it.
    """
    needed = int(plan.certain_bytes * (1 - done))
    free = free_disk(out)
    if needed > free:
        raise RequestError(
            f"the run needs {'at least ' if at_least else ''}{show_bytes(needed)} on disk, but the disk of {out} has "
            f"{show_bytes(free)} free. Ask for fewer sites, layers or sequences (--preset statistics is about 85 times "
            "smaller than patterns), or choose another --out."
        )
    memory = available_memory()
    if plan.host_bytes > memory and not plan.elsewhere:
        raise RequestError(
            f"the run needs {show_bytes(plan.host_bytes)} of memory, but {show_bytes(memory)} are available. Use a "
            f"smaller --block than {plan.geometry.block}, fewer sites or --workers, or a smaller model, or end other "
            "programs."
        )


def host_bytes(
    config: RunConfig,
    model: ModelConfig,
    selection: Selection,
    shape: Geometry,
    arrays: tuple[ArraySpec, ...],
) -> int:
    """Project the peak memory of extraction in one process, in bytes: the sum of what is allocated, rounded up."""
    if config.device != "cpu":  # the ring of a device; stream and work are there
        ring = ring_capacity(sequence_bytes(spec) for spec in arrays)
        return (
            BASE_BYTES
            + int(4.4 * sum(prod(s) for s in model.shapes().values()))
            + ring
            + ring_bytes(arrays)
        )
    d = model.d_model
    wide = padded(shape.seq_len)
    item = COMPUTE_BYTES[config.compute]
    n_weights = sum(prod(s) for s in model.shapes().values())
    weights = 4 * n_weights + (item * n_weights if config.compute != "fp32" else 0)
    weights += model.d_vocab * d * (item if config.compute != "fp32" else 0)
    reference = any(isinstance(edit, Edit) and edit.op in REFERENCE for edit in config.edits)
    stream = 4 * shape.block * wide * d * (2 if reference else 1)
    rows = shape.micro * wide
    work = rows * (6 * d * 4 + 3 * d * (4 + item) + 2 * model.d_mlp * item + 2 * d * item)
    queries = attention_rows(shape.seq_len)
    n_attention = model.n_head * queries * wide * 4
    work += 2 * n_attention + (2 * n_attention if set(selection.sites) & set(STATISTICS) else 0)
    work += model.n_head * wide * (2 * model.d_head + 16) * 8 + 8 * 4 * rows * model.n_head
    work += shape.micro * wide * wide * 4
    if {"loss", "top_logits", "top_tokens", "logits"} & set(selection.sites):
        value_bytes = item if config.compute in ("fp32", "fp64") else 4 + item
        work += logit_rows(model.d_vocab, value_bytes) * model.d_vocab * value_bytes
    work += 2 * rows * max(wide_values(selection.sites, model).values(), default=0)
    return BASE_BYTES + int(1.1 * (weights + stream + work)) + ring_bytes(arrays)


def free_disk(out: PlaceLike) -> int:
    """Return the free bytes of the file system that will hold `out`; an object store has no end."""
    free = place_of(out).free_bytes()
    return ENDLESS if free is None else free


def _spec(
    name: str,
    config: RunConfig,
    model: ModelConfig,
    selection: Selection,
    shape: Geometry,
    n_sequences: int,
) -> ArraySpec:
    site = SITES[name]
    dims = tuple(
        "selected_position"
        if d == "position" and site.group == "vector" and selection.positions is not None
        else d
        for d in site.dims
    )
    sizes = {
        "layer": len(selection.layers),
        "depth": len(selection.depths),
        "head": len(selection.heads),
        "sequence": n_sequences,
        "position": shape.seq_len,
        "query": shape.seq_len,
        "key": shape.seq_len,
        "selected_position": len(selection.positions or ()),
        "d_model": model.d_model,
        "d_head": model.d_head,
        "d_mlp": model.d_mlp,
        "d_vocab": model.d_vocab,
        "rank": config.top_k,
    }
    attributes = (
        {"title": site.title, "transformer_lens": site.alias}
        if site.alias
        else {"title": site.title}
    )
    block = min(
        shape.block, 1 << (n_sequences - 1).bit_length()
    )  # a run shorter than a block has shorter chunks
    return make_spec(
        name,
        dims,
        sizes,
        config.dtype_of(name),
        config.codec_of(name),
        site.fill,
        block,
        attributes,
    )


def _power_of_two(n: int) -> int:
    return 1 << max(n, 1).bit_length() - 1
