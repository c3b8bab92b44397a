"""The peak memory of an extraction, as arithmetic: a line a buffer, beside the place that allocates it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from headwater.extractor.edits.grammar import REFERENCE, Edit
from headwater.extractor.model.batch import attention_rows, logit_rows, padded
from headwater.extractor.model.transfer import ring_capacity
from headwater.extractor.model.weights import ModelConfig
from headwater.extractor.request import RunConfig
from headwater.extractor.selection import Selection
from headwater.kernels.cpu.rows import STATISTICS
from headwater.store.layout import ArraySpec, sequence_bytes
from headwater.store.writer import ring_bytes

# The interpreter with torch, zarr and pyarrow loaded, before any model.
BASE_BYTES = 640 << 20
# What the allocator and the products' own scratch memory take beyond the buffers that are counted here.
SLACK = 1.1
COMPUTE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
FLOAT_BYTES = 4
OUTPUT_SITES = {"loss", "top_logits", "top_tokens", "logits"}


def host_bytes(
    config: RunConfig,
    model: ModelConfig,
    selection: Selection,
    arrays: tuple[ArraySpec, ...],
    seq_len: int,
    block: int,
    micro: int,
) -> int:
    """Project the peak memory of all processes on this machine that extract, in bytes, rounded up.

    Where the blocks are computed elsewhere, on a cluster, it is that of one of its workers.
    """
    if config.device == "cpu":
        stream = _stream_bytes(config, model, seq_len, block)
        work = _work_bytes(config, model, selection, seq_len, micro)
        counted = _weight_bytes(config, model) + stream + work
        one = BASE_BYTES + int(SLACK * counted) + ring_bytes(arrays)
    else:
        # Stream and work are on the device; here are the weights on their way, and the ring of the transfer.
        weights = int(SLACK * FLOAT_BYTES * n_parameters(model))
        ring = ring_capacity(sequence_bytes(spec) for spec in arrays)
        one = BASE_BYTES + weights + ring + ring_bytes(arrays)
    if not config.workers or config.ray is not None:
        return one
    # Workers on this machine map the weights that the driver holds and publishes.
    return one * config.workers + BASE_BYTES + FLOAT_BYTES * n_parameters(model)


def n_parameters(model: ModelConfig) -> int:
    """Count the values of all weights."""
    return sum(prod(shape) for shape in model.shapes().values())


def wide_values(sites: Sequence[str], model: ModelConfig) -> dict[str, int]:
    """Return the bytes a token, in float32, of those sites whose values dwarf a model's other ones."""
    wide = {
        "logits": FLOAT_BYTES * model.d_vocab,
        "attn_result": FLOAT_BYTES * model.n_head * model.d_model,
    }
    return {site: n_bytes for site, n_bytes in wide.items() if site in sites}


def _weight_bytes(config: RunConfig, model: ModelConfig) -> int:
    """Count the weights as they are read, and in another compute type their copy and that of the unembedding."""
    n_weights = n_parameters(model)
    read = FLOAT_BYTES * n_weights
    if config.compute == "fp32":
        return read
    item = COMPUTE_BYTES[config.compute]
    unembedding = item * model.d_vocab * model.d_model
    return read + item * n_weights + unembedding


def _stream_bytes(config: RunConfig, model: ModelConfig, seq_len: int, block: int) -> int:
    """Count the block's residual stream, twice where an edit compares with a pass of its own."""
    stream = FLOAT_BYTES * block * padded(seq_len) * model.d_model
    compares = any(isinstance(edit, Edit) and edit.op in REFERENCE for edit in config.edits)
    return 2 * stream if compares else stream


def _work_bytes(
    config: RunConfig, model: ModelConfig, selection: Selection, seq_len: int, micro: int
) -> int:
    """Count what one micro-batch allocates on its way through a layer and the output."""
    d = model.d_model
    wide = padded(seq_len)
    rows = micro * wide
    item = COMPUTE_BYTES[config.compute]
    sites = set(selection.sites)
    # Model._norm and _add: the stream's copies, a LayerNorm's output and statistics, in float32.
    work = rows * 6 * d * FLOAT_BYTES
    # Model._attention: q, k and v as the product gives them, and widened to float32.
    work += rows * 3 * d * (FLOAT_BYTES + item)
    # Model._neurons: the neurons and what the activation writes.
    work += rows * 2 * model.d_mlp * item
    # Model._linear: the output projections.
    work += rows * 2 * d * item
    # attend: scores and probabilities of all heads for one block of queries, again twice for the statistics.
    n_attention = model.n_head * attention_rows(seq_len) * wide * FLOAT_BYTES
    work += 2 * n_attention
    if sites & set(STATISTICS):
        work += 2 * n_attention
    # attend: keys and values transposed, in float64 at most, and the vectors of the statistics.
    work += model.n_head * wide * (2 * model.d_head + 16) * 8
    work += 8 * FLOAT_BYTES * rows * model.n_head
    # make_batch: the mask of every sequence.
    work += micro * wide * wide * FLOAT_BYTES
    if sites & OUTPUT_SITES:
        # Model._logits: some rows in the compute type, and their copy in float32 where that is another.
        value_bytes = item if config.compute in ("fp32", "fp64") else FLOAT_BYTES + item
        work += logit_rows(model.d_vocab, value_bytes) * model.d_vocab * value_bytes
    # Whole logits and the results of all heads: as computed, and as cast.
    return work + 2 * rows * max(wide_values(selection.sites, model).values(), default=0)
