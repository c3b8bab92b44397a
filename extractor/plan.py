"""Decide everything before anything runs: geometry, arrays, and their bytes on disk and in memory.

A plan is made once. While the text is not counted it is a lower bound, of one sequence; `sized` makes it whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from headwater.extractor.edits.grammar import Edit
from headwater.extractor.edits.places import place_edits
from headwater.extractor.memory import host_bytes, wide_values
from headwater.extractor.model.weights import ModelConfig
from headwater.extractor.request import RunConfig
from headwater.extractor.selection import Selection, select
from headwater.extractor.sites import SITES, VECTOR, RequestError, parse_site
from headwater.store.layout import ArraySpec, make_spec
from headwater.store.manifest import PLAIN_CHUNK_BYTES, Manifest

# Tokens that are committed together and computed together: a block's stream fits into memory, a micro-batch's work
# into a processor's cache. A GPU needs more at once to be busy.
BLOCK_TOKENS = 16384
MICRO_TOKENS = 2048
GPU_BLOCK_TOKENS = 131072
GPU_MICRO_TOKENS = 65536
# What one micro-batch of whole logits, or of the results of all heads, may take.
WIDE_BYTES = 256 << 20
GPU_WIDE_BYTES = 2 << 30
# Bytes on disk beside the values: a zarr.json, a ledger entry and what it says of a shard, a checksum.
METADATA_BYTES = 4096
ENTRY_BYTES = 512
ENTRY_BYTES_A_SHARD = 80
SUM_BYTES = 4
N_OTHER_ARRAYS = 16


@dataclass(frozen=True)
class Geometry:
    """How sequences are grouped: `block` are committed together, `micro` computed together."""

    seq_len: int
    block: int
    micro: int


@dataclass(frozen=True)
class Plan:
    """What a run will be: arrays, bytes and memory, known once the number of sequences is.

    `notes` are what a reader should know of the checkpoint.
    `text` says of its text, where that was read for the plan, what the manifest keeps (`Source.describe`).
    """

    request: RunConfig
    model: ModelConfig
    selection: Selection
    geometry: Geometry
    n_sequences: int
    canonical: dict[str, object]
    notes: tuple[str, ...] = ()
    text: dict[str, object] = field(default_factory=dict)

    def sized(self, n_sequences: int) -> Plan:
        """Return the plan of the same run with its sequences counted."""
        return replace(self, n_sequences=n_sequences)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """What is changed in the forward pass."""
        return tuple(edit for edit in self.request.edits if isinstance(edit, Edit))

    @property
    def top_k(self) -> int:
        """How many logits a position keeps."""
        return self.request.top_k

    @property
    def elsewhere(self) -> bool:
        """Whether the blocks are computed on a cluster."""
        return self.request.ray is not None

    @property
    def n_blocks(self) -> int:
        return -(-self.n_sequences // self.geometry.block)

    @property
    def blocks(self) -> range:
        """The numbers of all blocks."""
        return range(self.n_blocks)

    @cached_property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """The captured arrays, in the order of the sites."""
        return tuple(_spec(site, self) for site in self.selection.sites)

    @cached_property
    def host_bytes(self) -> int:
        """The memory of all processes on this machine or, where the blocks are computed `elsewhere`, of one worker."""
        return host_bytes(
            self.request,
            self.model,
            self.selection,
            self.arrays,
            seq_len=self.geometry.seq_len,
            block=self.geometry.block,
            micro=self.geometry.micro,
        )

    @cached_property
    def text_bytes(self) -> int:
        """The bytes of what is not an activation: tokens and the like, `complete`, metadata, the ledger."""
        return text_bytes(self.arrays, self.geometry, self.n_sequences)

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
        plain = [spec.name for spec in self.arrays if spec.codec == "none"]
        return self.text_bytes + sum(sizes[name] for name in plain)

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
    """Fix sequence length, block and micro-batch from the request and the model, never from the run's length.

    `seq_len` is that of ready ids, which come in rows already.
    """
    length = seq_len or config.seq_len or model.n_ctx
    if length > model.n_ctx:
        _refuse_length(length, model.n_ctx, of_ids=bool(seq_len))
    tokens, micro, room = BLOCK_TOKENS, MICRO_TOKENS, WIDE_BYTES
    if config.device != "cpu":
        tokens, micro, room = GPU_BLOCK_TOKENS, GPU_MICRO_TOKENS, GPU_WIDE_BYTES
    sites = [parse_site(name)[0] for name in config.requested]
    for n_bytes in wide_values(sites, model).values():
        micro = min(micro, room // n_bytes)
    block = config.block or _power_of_two(tokens // length)
    return Geometry(length, block, min(block, _power_of_two(micro // length)))


def _refuse_length(length: int, n_ctx: int, of_ids: bool) -> None:
    if of_ids:
        raise RequestError(
            f"the rows of --tokens have {length} positions, but the model has only {n_ctx} (n_ctx). Cut "
            f"them, or make windows over them with --stride {n_ctx}.",
            flag="tokens",
        )
    raise RequestError(
        f"--seq-len is {length}, but the model has only {n_ctx} positions (n_ctx). Use {n_ctx} or "
        "less; longer documents are cut into rows.",
        flag="seq_len",
    )


def make_plan(config: RunConfig, model: ModelConfig, shape: Geometry, n_sequences: int = 1) -> Plan:
    """Plan a run of `n_sequences`; raise RequestError where the request does not fit the model."""
    selection = select(
        model,
        shape.seq_len,
        config.requested,
        layers=config.layers,
        depths=config.depths,
        heads=config.heads,
        positions=config.positions,
    )
    if {"top_logits", "top_tokens"} & set(selection.sites) and config.top_k > model.d_vocab:
        raise RequestError(
            f"--top-k is {config.top_k}, but the vocabulary has {model.d_vocab} tokens.",
            flag="top_k",
        )
    plan = Plan(
        request=config,
        model=model,
        selection=selection,
        geometry=shape,
        n_sequences=n_sequences,
        canonical=config.canonical(selection, shape.seq_len, shape.block),
    )
    place_edits(plan.edits, model, shape.seq_len)
    if plan.edits and config.device != "cpu":
        raise RequestError(
            f"--edit {str(plan.edits[0])!r} with --device {config.device}: edits change the forward of the CPU only. "
            "Leave --device out.",
            flag="device",
        )
    return plan


def plan_of(config: RunConfig, model: ModelConfig, manifest: Manifest) -> Plan:
    """Rebuild the plan of a run from its manifest."""
    shape = Geometry(manifest.n_positions, manifest.block, manifest.micro)
    return make_plan(replace(config, block=manifest.block), model, shape, manifest.n_sequences)


def text_bytes(arrays: tuple[ArraySpec, ...], shape: Geometry, n_sequences: int) -> int:
    """Project the bytes of what is not an activation: tokens and the like, `complete`, metadata, the ledger."""
    n_blocks = -(-n_sequences // shape.block)
    total = 0
    # tokens and row_start, int32 a position; length, int32; document and offset, int64.
    for width in (4 * shape.seq_len, 4 * shape.seq_len, 4, 8, 8):
        rows = min(max(PLAIN_CHUNK_BYTES // width, 1), n_sequences)
        n_chunks = -(-n_sequences // rows)
        total += n_chunks * (rows * width + SUM_BYTES)
    shards = sum(len(spec.block_shards(0, min(shape.block, n_sequences))) for spec in arrays)
    complete = shape.block + SUM_BYTES
    entry = ENTRY_BYTES + ENTRY_BYTES_A_SHARD * shards
    return total + n_blocks * (complete + entry) + METADATA_BYTES * (N_OTHER_ARRAYS + len(arrays))


def _spec(name: str, plan: Plan) -> ArraySpec:
    """Lay out the array of a site."""
    site = SITES[name]
    selection = plan.selection
    dims = site.dims
    if site.group == VECTOR and selection.positions is not None:
        dims = tuple("selected_position" if dim == "position" else dim for dim in dims)
    attributes = {"title": site.title}
    if site.alias:
        attributes["transformer_lens"] = site.alias
    # A run shorter than a block has shorter chunks.
    block = min(plan.geometry.block, 1 << (plan.n_sequences - 1).bit_length())
    return make_spec(
        name,
        dims,
        _sizes(plan),
        plan.request.dtype_of(name),
        plan.request.codec_of(name),
        site.fill,
        block,
        attributes,
    )


def _sizes(plan: Plan) -> dict[str, int]:
    """Return the length of every dimension."""
    selection = plan.selection
    model = plan.model
    length = plan.geometry.seq_len
    return {
        "layer": len(selection.layers),
        "depth": len(selection.depths),
        "head": len(selection.heads),
        "sequence": plan.n_sequences,
        "position": length,
        "query": length,
        "key": length,
        "selected_position": len(selection.positions or ()),
        "d_model": model.d_model,
        "d_head": model.d_head,
        "d_mlp": model.d_mlp,
        "d_vocab": model.d_vocab,
        "rank": plan.top_k,
    }


def _power_of_two(n: int) -> int:
    """Return the largest power of two up to n, 1 at least."""
    return 1 << max(n, 1).bit_length() - 1
